"""The suite: all probes that fit a checkpoint and its data."""

from typing import Literal

from pydantic import BaseModel

from mae.errors import ConfigError
from mae.probes.attentive import Attentive
from mae.probes.knn import KNN
from mae.probes.linear import Linear
from mae.probes.models_under_probe import ModelsUnderProbe
from mae.probes.probe import Probe
from mae.probes.reconstruct import Reconstruct


class Suite(BaseModel, frozen=True, extra="forbid"):
    """Settings of each probe of the suite (`probe=suite`)."""

    name: Literal["suite"]
    knn: KNN
    linear: Linear
    attentive: Attentive
    reconstruct: Reconstruct


def require_fit(probe: Probe, probed: ModelsUnderProbe) -> None:
    """Raises ConfigError if a probe cannot measure these models and images."""
    if reason := probe.refusal(probed):
        raise ConfigError(f"probe={probe.name} {reason}")


def select_probes(probe: Probe | Suite, probed: ModelsUnderProbe) -> tuple[list[Probe], dict[str, str]]:
    """Returns the probes that fit the models and images, and why the others of a suite do not.

    Raises ConfigError if none fits.
    """
    if not isinstance(probe, Suite):
        require_fit(probe, probed)
        return [probe], {}
    members: list[Probe] = [probe.knn, probe.linear, probe.attentive, probe.reconstruct]
    refusals = {member.name: member.refusal(probed) for member in members}
    left_out = {name: reason for name, reason in refusals.items() if reason is not None}
    if len(left_out) == len(members):
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise ConfigError(f"probe=suite has no probe that fits: {reasons}")
    return [member for member in members if member.name not in left_out], left_out
