"""Probes agree with other libraries, and find what is in the features."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from mae.probes.attentive import AttentiveConfig, AttentivePool, Fitter, Setting, attentive_accuracy
from mae.probes.features import Features, rankme
from mae.probes.held_out import choose
from mae.probes.knn import knn_accuracy, neighbours
from mae.probes.lars import LarsConfig, lars, lars_accuracy, linear_head
from mae.probes.linear import linear_accuracy
from mae.probes.probe import share_of_largest

CPU = torch.device("cpu")


def features(values: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(torch.arange(len(labels)), labels, values)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def test_knn_agrees_with_scikit_learn(digits) -> None:
    x, y = digits
    ours = knn_accuracy(features(x[:1200], y[:1200]), features(x[1200:], y[1200:]), k=20)
    theirs = KNeighborsClassifier(20, metric="cosine").fit(x[:1200], y[:1200]).score(x[1200:], y[1200:])
    assert ours == pytest.approx(theirs, abs=5 / 597)  # equal votes are decided differently


def test_knn_of_one_neighbour_equals_the_nearest_of_scikit_learn(digits) -> None:
    x, y = digits
    theirs = KNeighborsClassifier(1, metric="cosine").fit(x[:1200], y[:1200])
    ours = knn_accuracy(features(x[:1200], y[:1200]), features(x[1200:], y[1200:]), k=1)
    assert ours == pytest.approx(theirs.score(x[1200:], y[1200:]))
    _, nearest = neighbours(x[:1200], x[1200:], 1)
    assert nearest.tolist() == theirs.kneighbors(x[1200:], return_distance=False).tolist()


def test_probes_of_random_features_score_near_chance(digits) -> None:
    _, y = digits
    noise = torch.tensor(np.random.default_rng(0).normal(size=(len(y), 32)), dtype=torch.float32)
    train, test = features(noise[:1200], y[:1200]), features(noise[1200:], y[1200:])
    accuracy, _ = linear_accuracy(train, test, [1e-3, 1.0])
    assert accuracy < 0.2
    assert knn_accuracy(train, test) < 0.2


def test_linear_probe_scores_above_88_percent_on_digits(digits) -> None:
    x, y = digits
    accuracy, best = linear_accuracy(features(x[:1200], y[:1200]), features(x[1200:], y[1200:]), [1e-3, 1e-1])
    assert accuracy > 0.88 and best.value in (1e-3, 1e-1)


def accuracy_peaks_at(peak: float):
    """Returns accuracies that fall with the distance to a value, in decades."""
    return lambda values, fit, held: [1 - abs(np.log10(value / peak)) / 20 for value in values]


@pytest.mark.parametrize(("peak", "expected"), [(30.0, 10.0), (1e-5, 1e-5), (0.01, 0.01), (1e5, 1e5)])
def test_choice_goes_on_beyond_an_end_of_the_list_until_the_best_is_inside(peak: float, expected: float) -> None:
    best = choose("C", [1e-3, 1e-2, 1e-1, 1.0], torch.arange(100) % 10, 0, accuracy_peaks_at(peak))
    assert best.value == pytest.approx(expected) and not best.remark


def test_choice_at_the_end_of_all_that_is_tried_is_said() -> None:
    best = choose("C", [0.1, 1.0], torch.arange(100) % 10, 0, accuracy_peaks_at(1e12))
    assert best.value == 1e6
    assert "C=1e+06 is the best of those tried, 0.1 to 1e+06, and at their end" in best.remark


def test_choice_of_equal_accuracies_is_the_first_and_tries_one_more() -> None:
    tried: list[float] = []

    def accuracies(values: list[float], fit: torch.Tensor, held: torch.Tensor) -> list[float]:
        tried.extend(values)
        return [0.5] * len(values)

    assert choose("lr", [1e-3, 1e-2], torch.arange(100) % 10, 0, accuracies) == (1e-3, "")
    assert tried == [1e-3, 1e-2, 1e-4]


def test_share_of_the_largest_class_is_that_of_the_training_images() -> None:
    train, test = torch.tensor([7] * 95 + [2] * 5), torch.tensor([2] * 3 + [7] * 2)
    assert share_of_largest(train, test) == pytest.approx(0.4)


def test_linear_probe_of_few_images_takes_the_first_strength_and_says_so(digits) -> None:
    two = features(torch.eye(2), torch.arange(2))
    accuracy, best = linear_accuracy(two, two, [1.0, 10.0])
    assert accuracy == 1.0 and best.value == 1.0
    assert "2 training images are too few to hold some out" in best.remark


def test_linear_probe_agrees_with_scikit_learns_own_search(digits) -> None:
    """On features whose best strength lies beyond the list."""
    x, y = digits
    generator = torch.Generator().manual_seed(0)
    x = torch.tanh((x / 16 - 0.5) @ torch.randn(64, 192, generator=generator) / 4)
    ours, best = linear_accuracy(features(x[:1000], y[:1000]), features(x[1000:], y[1000:]), [1e-3, 1e-2])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    held_out = train_test_split(np.arange(1000), test_size=0.2, random_state=0)
    strengths = {"logisticregression__C": [10.0**power for power in range(-3, 5)]}
    theirs = GridSearchCV(pipeline, strengths, cv=[held_out]).fit(x[:1000].numpy(), y[:1000].numpy())
    assert best.value > 1e-2 and not best.remark
    assert ours == pytest.approx(theirs.score(x[1000:].numpy(), y[1000:].numpy()), abs=8 / 797)


def test_linear_probe_of_three_samples_holds_one_out() -> None:
    three = features(torch.eye(3), torch.arange(3))
    assert linear_accuracy(three, three, [1.0, 10.0])[0] == 1.0


def test_lars_update_equals_that_of_the_paper(digits) -> None:
    """Matrices move by the trust coefficient times |w| / |gradient|, what has one dimension by plain momentum."""
    x, y = digits
    head = linear_head(64, 10, torch.Generator().manual_seed(0))
    optimizer = lars(head)
    weight, bias = (parameter.detach().clone() for parameter in head[1].parameters())
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for lr in (0.5, 1.0, 0.2):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        F.cross_entropy(head(x[:256]), y[:256]).backward()
        gradient = [parameter.grad for parameter in head[1].parameters()]
        momentum[0] = 0.9 * momentum[0] + gradient[0] * 0.001 * weight.norm() / gradient[0].norm()
        momentum[1] = 0.9 * momentum[1] + gradient[1]
        weight, bias = weight - lr * momentum[0], bias - lr * momentum[1]
        optimizer.step()
        assert torch.allclose(head[1].weight, weight, rtol=1e-5, atol=1e-8)
        assert torch.allclose(head[1].bias, bias, rtol=1e-5, atol=1e-8)


def test_lars_probe_of_several_views_scores_above_85_percent_on_digits(digits) -> None:
    x, y = digits
    noise = [0.1 * torch.randn(1200, 64, generator=torch.Generator().manual_seed(view)) for view in range(3)]
    views, test = [features(x[:1200] + part, y[:1200]) for part in noise], features(x[1200:], y[1200:])
    config = LarsConfig(base_lr=20, batch=128, epochs=30, warmup_epochs=3, views=3)  # 270 steps, not 7,000
    accuracy, _ = lars_accuracy(views, test, config, 0, CPU)
    assert accuracy > 0.85
    assert accuracy == lars_accuracy(views, test, config, 0, CPU)[0]


def test_lars_probe_searches_a_list_of_learning_rates(digits) -> None:
    x, y = digits
    config = LarsConfig(base_lr=[2, 20], batch=128, epochs=15, warmup_epochs=1)
    accuracy, best = lars_accuracy([features(x[:600], y[:600])], features(x[600:], y[600:]), config, 0, CPU)
    assert best.value >= 20 and accuracy > 0.7


def one_token_tells(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, 16, 32] of noise; one of them, anywhere, is marked and holds the class."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(images, 16, 32, generator=generator)
    labels = torch.randint(4, (images,), generator=generator)
    where = torch.randint(16, (images,), generator=generator)
    tokens[torch.arange(images), where] = 5.0 * (F.one_hot(labels, 32) + F.one_hot(torch.tensor(31), 32))
    return tokens, labels


def test_attentive_probe_finds_the_one_informative_token() -> None:
    (train, train_labels), (test, test_labels) = one_token_tells(1000, 0), one_token_tells(500, 1)
    config = AttentiveConfig(lrs=[1e-4, 1e-2], weight_decays=[0.01], steps=200, batch=64)
    tokens = features(train, train_labels), features(test, test_labels)
    accuracy, setting, _ = attentive_accuracy(*tokens, 2, config, 0, CPU)
    means = features(train.mean(1), train_labels), features(test.mean(1), test_labels)
    mean, _ = linear_accuracy(*means, [1e-2, 1.0])
    assert setting == Setting(1e-2, 0.01)
    assert accuracy > 0.97 > mean + 0.1


def test_attentive_pool_equals_torchs_attention_of_one_query() -> None:
    """Compares with torch's attention with projected keys and values."""
    generator = torch.Generator().manual_seed(0)
    pool = AttentivePool(2, 32, 4, 10, generator)
    tokens = torch.randn(3, 16, 32, generator=generator)
    peer = torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    query, keys, values = (torch.randn(32, 32, generator=generator) * 0.2 for _ in range(3))
    learned = torch.randn(1, 32, generator=generator)
    peer.in_proj_weight.data = torch.cat([query, keys, values])
    peer.out_proj.weight.data = torch.eye(32)
    pool.query[1].data = torch.einsum("hd,hdk->hk", (learned @ query.T).view(4, 8), keys.view(4, 8, 32)) * 8**-0.5
    pool.value[1].data = values.view(4, 8, 32).mT.contiguous()
    expected = peer(learned.expand(3, 1, 32), tokens, tokens)[0][:, 0] @ pool.head[1] + pool.bias[1]
    assert torch.allclose(pool(tokens)[1], expected, atol=1e-5)


def test_attentive_probes_trained_together_equal_those_trained_alone() -> None:
    tokens, labels = one_token_tells(200, 0)
    settings = {"lrs": [1e-3, 1e-2], "weight_decays": [0.1], "steps": 20, "batch": 64}
    fitter = Fitter(features(tokens, labels), 4, 2, AttentiveConfig(**settings), 0, CPU)
    both = fitter.fit(torch.arange(200), [Setting(1e-3, 0.1), Setting(1e-2, 0.1)])
    alone = fitter.fit(torch.arange(200), [Setting(1e-2, 0.1)])
    with torch.no_grad():
        assert torch.allclose(both(tokens)[1], alone(tokens)[0], atol=1e-3)


def test_rankme_equals_the_exponential_of_the_spectral_entropy() -> None:
    features = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    eigenvalues = np.linalg.eigvalsh(features.double().numpy().T @ features.double().numpy())
    share = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    assert rankme(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=2e-5)  # eps


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_rankme_of_equally_strong_directions_is_their_number(rank: int) -> None:
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(rank)))
    features = torch.cat([basis[:rank], -basis[:rank]])
    assert rankme(features) == pytest.approx(rank, rel=1e-3)
