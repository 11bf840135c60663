"""All probes that fit a checkpoint and its data, with one table, one file and one figure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from mae.errors import ConfigError
from mae.probes.attentive import Attentive
from mae.probes.knn import KNN
from mae.probes.linear import Linear
from mae.probes.models_under_probe import Subject
from mae.probes.probe import Probe
from mae.probes.reconstruct import Reconstruct


class Suite(BaseModel):
    """The probes of a suite with the settings of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["suite"]
    knn: KNN
    linear: Linear
    attentive: Attentive
    reconstruct: Reconstruct


def fitting(probe: Probe | Suite, subject: Subject) -> tuple[list[Probe], dict[str, str]]:
    """The probes to be done, and those of a suite that cannot be, with the reason.

    Raises ConfigError when nothing is left.
    """
    if not isinstance(probe, Suite):
        if reason := probe.refusal(subject):
            raise ConfigError(f"probe={probe.name} {reason}")
        return [probe], {}
    members: list[Probe] = [probe.knn, probe.linear, probe.attentive, probe.reconstruct]
    refusals = {member.name: member.refusal(subject) for member in members}
    left_out = {name: reason for name, reason in refusals.items() if reason is not None}
    if len(left_out) == len(members):
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise ConfigError(f"probe=suite has no probe that fits: {reasons}")
    return [member for member in members if member.name not in left_out], left_out
