"""The network on an NVIDIA GPU: the same numbers as on the CPU, in bfloat16 where that was asked for."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from ulmfit.config import ClassifierConfig, DropoutConfig
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.losses import chunked_cross_entropy, summed_cross_entropy
from ulmfit.nn.models import LanguageModel, TextClassifier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPE = Architecture(60, 24, 40, 3)
NO_DROPOUT = DropoutConfig(multiplier=0.0)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def language_model(dropout: DropoutConfig = NO_DROPOUT) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AWDLSTM(SHAPE, dropout)).train()


def batch(rows: int = 16, steps: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 60, (rows, steps + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model: LanguageModel, device: str, mixed: bool = False) -> tuple[float, list[torch.Tensor]]:
    model = copy.deepcopy(model).to(device)
    tokens, targets = (part.to(device) for part in batch())
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        first = model.loss(tokens, targets, None, 2.0, 1.0)
        state = [(h.detach(), c.detach()) for h, c in first.state]
        out = model.loss(tokens, targets, state, 2.0, 1.0)
    loss = first.cross_entropy + out.cross_entropy + out.penalty
    loss.backward()
    return float(loss.detach()), [
        parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None
    ]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest error of a tensor, relative to its norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in pairs)


def test_loss_and_gradients_are_those_of_the_cpu() -> None:
    model = language_model()
    loss, gradients = loss_and_gradients(model, "cuda")
    expected, of_cpu = loss_and_gradients(model, "cpu")
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(gradients, of_cpu) < 1e-4


def test_autocast_is_bfloat16_also_in_the_lstms() -> None:
    """torch's autocast takes float16 for cuDNN's LSTM, whose smallest numbers are above these gradients."""
    model = language_model()
    loss, gradients = loss_and_gradients(model, "cuda", mixed=True)
    expected, exact = loss_and_gradients(model, "cpu")
    assert loss == pytest.approx(expected, rel=0.01)
    assert difference(gradients, exact) < 0.05
    model.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden, state = model.encoder(batch()[0].cuda())
        assert hidden.dtype == state[0][0].dtype == torch.bfloat16
        (1e-9 * hidden.float().sum()).backward()
    gradient = model.encoder.rnns[0].weight_ih_l0.grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert float(gradient.abs().max()) > 0  # float16 rounds these to nothing


@pytest.mark.parametrize("mixed", [False, True])
def test_weight_dropout_without_complaints(mixed: bool) -> None:
    model = language_model(DropoutConfig(0, 0, 0, 0, 0.5)).to("cuda")
    tokens, targets = (part.cuda() for part in batch())
    with warnings.catch_warnings(), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        warnings.simplefilter("error")  # such as that weights do not lie in one piece
        model.loss(tokens, targets).cross_entropy.backward()
    gradient = model.encoder.rnns[1].weight_hh_l0.grad
    assert gradient is not None
    assert 0.4 < float((gradient == 0).float().mean()) < 0.6  # of the entries that were dropped


def classifier() -> TextClassifier:
    torch.manual_seed(1)
    return TextClassifier(AWDLSTM(SHAPE), ClassifierHead(3 * 24, 10, 4), bptt=7, max_len=20)


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([33, 21, 20, 8, 7, 1])
    tokens = torch.randint(3, 60, (6, 33), generator=torch.Generator().manual_seed(5))
    return tokens * (torch.arange(33) < lengths[:, None]), lengths


def test_a_document_does_not_depend_on_its_batch() -> None:
    model = classifier().to("cuda").eval()
    tokens, lengths = documents()
    with torch.inference_mode():
        together = model(tokens.cuda(), lengths)
        assert torch.equal(together, model(tokens.cuda(), lengths.cuda()))  # on whichever device the lengths are
        alone = [model(tokens[i : i + 1, :n].cuda(), lengths[i : i + 1])[0] for i, n in enumerate(lengths)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    expected = classifier().eval()(tokens, lengths)
    torch.testing.assert_close(together.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_learns_the_same_as_on_the_cpu() -> None:
    config = ClassifierConfig(bptt=7, max_len=20, head_dropout=[0.0, 0.0])
    torch.manual_seed(2)
    model = new_text_classifier(AWDLSTM(SHAPE, NO_DROPOUT), 4, config).train()
    model.head.dropout = (0.0, 0.0)
    found = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        tokens, lengths = documents()
        out = twin.classify(tokens.to(device), lengths, 2.0, 1.0)
        (out.logits.logsumexp(1).sum() + out.penalty).backward()
        found.append([parameter.grad.cpu() for parameter in twin.parameters() if parameter.grad is not None])
    assert difference(found[1], found[0]) < 1e-3


def test_cross_entropy_in_bfloat16() -> None:
    torch.manual_seed(4)
    hidden, weight, bias = torch.randn(700, 24), torch.randn(60, 24) / 4, torch.randn(60)
    targets = torch.randint(0, 60, (700,))
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T + bias.double(), targets)
    inputs = [part.cuda().requires_grad_() for part in (hidden, weight, bias)]
    loss = chunked_cross_entropy(*inputs, targets.cuda(), chunk=256, dtype=torch.bfloat16)
    assert float(loss) == pytest.approx(float(exact), rel=5e-3)
    loss.backward()
    twins = [part.double().requires_grad_() for part in (hidden, weight, bias)]
    torch.nn.functional.cross_entropy(twins[0] @ twins[1].T + twins[2], targets).backward()
    for one, other in zip(inputs, twins, strict=True):
        assert one.grad is not None and other.grad is not None
        assert float((one.grad.cpu() - other.grad).norm() / other.grad.norm()) < 0.02
    total = summed_cross_entropy(*(part.detach() for part in inputs), targets.cuda())
    assert float(total) == pytest.approx(700 * float(exact), rel=1e-5)
