"""The encoder: its equations, where dropout acts, and that nothing stays behind on the module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ulmfit.nn.awd_lstm as awd_lstm
import ulmfit.nn.models as models
from ulmfit.config import DropoutConfig
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture, State, detach, select_rows, zeros_like_state
from ulmfit.nn.dropout import weight_dropout
from ulmfit.nn.models import LanguageModel

ARCHITECTURE = Architecture(vocab_size=30, embedding_dim=6, hidden_dim=10, num_layers=3)
NO_DROPOUT = DropoutConfig(0, 0, 0, 0, 0)


def encoder(**rates: float) -> AWDLSTM:
    """A small encoder in training mode with just these dropouts."""
    torch.manual_seed(0)
    return AWDLSTM(ARCHITECTURE, DropoutConfig(**{**NO_DROPOUT.__dict__, **rates}))


def tokens(batch: int = 3, steps: int = 8) -> Tensor:
    return torch.randint(0, 30, (batch, steps), generator=torch.Generator().manual_seed(1))


def test_names_and_shapes_of_the_default_network() -> None:
    with torch.device("meta"):
        model = AWDLSTM(Architecture(vocab_size=60_000))
    expected = {"embedding.weight": (60_000, 400)}
    for i, (inputs, hidden) in enumerate([(400, 1152), (1152, 1152), (1152, 400)]):
        expected |= {
            f"rnns.{i}.weight_ih_l0": (4 * hidden, inputs),
            f"rnns.{i}.weight_hh_l0": (4 * hidden, hidden),
            f"rnns.{i}.bias_ih_l0": (4 * hidden,),
            f"rnns.{i}.bias_hh_l0": (4 * hidden,),
        }
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_one_layer_keeps_the_embedding_size() -> None:
    assert Architecture(10, 6, 99, num_layers=1).layer_sizes() == [(6, 6)]


def test_equals_the_equations_of_the_paper() -> None:
    """Gates i, f, g, o in this order; bias is b_ih + b_hh."""
    model = encoder().eval()
    out, state = model(tokens())
    x = F.embedding(tokens(), model.embedding.weight)
    for layer, rnn in enumerate(model.rnns):
        p = dict(rnn.named_parameters())
        h = c = torch.zeros(3, p["weight_hh_l0"].size(1))
        steps = []
        for t in range(x.size(1)):
            gates = x[:, t] @ p["weight_ih_l0"].T + h @ p["weight_hh_l0"].T + (p["bias_ih_l0"] + p["bias_hh_l0"])
            i, f, g, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        x = torch.stack(steps, dim=1)
        assert torch.allclose(state[layer][0][0], h, atol=1e-6)
        assert torch.allclose(state[layer][1][0], c, atol=1e-6)
    assert torch.allclose(out, x, atol=1e-6)


class TestState:
    def test_reading_in_pieces_equals_reading_at_once(self) -> None:
        model = encoder().eval()
        whole, end = model(tokens())
        pieces, state = [], None
        for t in range(8):
            out, state = model(tokens()[:, t : t + 1], state)
            pieces.append(out)
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
        assert state is not None
        for (h, c), (h_end, c_end) in zip(state, end, strict=True):
            assert torch.allclose(h, h_end, atol=1e-6) and torch.allclose(c, c_end, atol=1e-6)

    def test_none_is_zeros(self) -> None:
        model = encoder().eval()
        zeros = zeros_like_state(ARCHITECTURE, 3, tokens())
        assert torch.equal(model(tokens(), zeros)[0], model(tokens())[0])
        assert [h.shape for h, _ in zeros] == [h.shape for h, _ in model(tokens())[1]]

    def test_detach_cuts_the_history_and_keeps_the_values(self) -> None:
        model = encoder()
        _, state = model(tokens())
        cut = detach(state)
        assert state[0][0].requires_grad and not any(t.requires_grad for pair in cut for t in pair)
        assert torch.equal(cut[2][1], state[2][1])
        model.zero_grad()
        only_token = torch.zeros(3, 1, dtype=torch.int64)
        model(only_token, cut)[0].sum().backward()
        assert model.embedding.weight.grad[1:].abs().sum() == 0  # nothing reached the tokens before the cut

    def test_rows_are_independent(self) -> None:
        model = encoder().eval()
        _, state = model(tokens())
        rows = torch.tensor([2, 0])
        out, _ = model(tokens()[rows], select_rows(state, rows))
        assert torch.allclose(out, model(tokens(), state)[0][rows], atol=1e-6)

    def test_another_precision_of_the_state_is_accepted(self) -> None:
        model = encoder().eval()
        _, state = model(tokens())
        half: State = [(h.bfloat16(), c.bfloat16()) for h, c in state]
        assert torch.allclose(model(tokens(), half)[0], model(tokens(), state)[0], atol=1e-2)

    def test_nothing_stays_on_the_module(self) -> None:
        """fastai keeps the hidden state on the module, so one reader changes what the next one sees."""
        model = encoder(weight=0.5, hidden=0.3, embedding=0.1)
        keys = [sorted(vars(m)) for m in model.modules()]
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model(tokens())[0].sum().backward()
        model(tokens(5, 3))
        assert [sorted(vars(m)) for m in model.modules()] == keys
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert not list(model.buffers())
        model.eval()
        assert torch.equal(model(tokens())[0], model(tokens())[0])

    def test_deepcopy_after_a_training_step(self) -> None:
        model = LanguageModel(encoder(weight=0.5))
        model.loss(tokens(), tokens(), ar_alpha=2, tar_beta=1).cross_entropy.backward()
        twin = copy.deepcopy(model)
        assert torch.equal(twin.eval()(tokens())[0], model.eval()(tokens())[0])
        with torch.no_grad():
            twin.encoder.embedding.weight.zero_()
        assert model.encoder.embedding.weight.abs().sum() > 0


class TestDropout:
    def test_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Embedding, input, rnn 0, hidden, rnn 1, hidden, rnn 2; output dropout belongs to the decoder."""
        calls: list[tuple[str, float]] = []

        def recorded(name: str) -> Any:
            original = getattr(awd_lstm, name)

            def call(*args: Any, **options: Any) -> Tensor:
                calls.append((name.split("_")[0], args[-2]))
                out: Tensor = original(*args, **options)
                return out

            return call

        for name in ("embedding_dropout", "variational_dropout", "weight_dropout"):
            monkeypatch.setattr(awd_lstm, name, recorded(name))
        monkeypatch.setattr(models, "variational_dropout", awd_lstm.variational_dropout)
        rates = DropoutConfig(input=0.1, hidden=0.2, output=0.3, embedding=0.4, weight=0.5)
        LanguageModel(AWDLSTM(ARCHITECTURE, rates))(tokens())
        assert calls == [
            ("embedding", 0.4),
            ("variational", 0.1),
            ("weight", 0.5),
            ("variational", 0.2),
            ("weight", 0.5),
            ("variational", 0.2),
            ("weight", 0.5),
            ("variational", 0.3),
        ]

    def test_weight_dropout_acts_on_hidden_to_hidden_weights_only(self) -> None:
        """The first step sees no hidden state, so no dropout; later steps do."""
        model = encoder(weight=0.5)
        dropped, plain = model(tokens())[0], model.eval()(tokens())[0]
        assert torch.allclose(dropped[:, 0], plain[:, 0], atol=1e-6)
        assert (dropped[:, 1:] - plain[:, 1:]).abs().max() > 1e-4

    def test_weight_dropout_equals_a_network_with_the_dropped_matrices(self) -> None:
        model = encoder(weight=0.5)
        torch.manual_seed(3)
        out, _ = model(tokens())
        out.pow(2).sum().backward()
        twin = encoder()
        torch.manual_seed(3)
        masks = []
        with torch.no_grad():
            for rnn in twin.rnns:
                masks.append(weight_dropout(torch.ones_like(rnn.weight_hh_l0), 0.5, True))
                rnn.weight_hh_l0.mul_(masks[-1])
        expected, _ = twin(tokens())
        expected.pow(2).sum().backward()
        assert torch.allclose(out, expected, atol=1e-6)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for name, p in twin.named_parameters():
            scale = masks[int(name.split(".")[1])] if name.endswith("weight_hh_l0") else 1.0
            assert torch.allclose(gradients[name], p.grad * scale, atol=1e-5), name

    @pytest.mark.parametrize("kind", ["input", "hidden", "embedding", "weight"])
    def test_each_kind_acts_in_training_anew_and_not_in_eval(self, kind: str) -> None:
        model = encoder(**{kind: 0.5})
        assert not torch.equal(model(tokens())[0], model(tokens())[0])
        assert torch.equal(model.eval()(tokens())[0], encoder().eval()(tokens())[0])

    def test_last_layer_has_no_dropout(self) -> None:
        assert (encoder(hidden=0.5, input=0.5)(tokens())[0] != 0).all()

    def test_multiplier_scales_and_a_rate_stays_below_one(self) -> None:
        model = encoder(hidden=0.3)
        model.dropout.multiplier = 0.5
        assert model.rate("hidden") == pytest.approx(0.15)
        model.dropout.multiplier = 9.0
        assert model.rate("hidden") == 0.95
        with pytest.raises(AttributeError, match="hiden"):
            model.rate("hiden")


class TestLanguageModel:
    def test_decoder_is_tied_to_the_undropped_embedding(self) -> None:
        model = LanguageModel(encoder(embedding=0.9))
        torch.nn.init.normal_(model.decoder.bias)
        torch.manual_seed(5)
        logits, _ = model(tokens())
        torch.manual_seed(5)
        raw, _ = model.encoder(tokens())
        assert torch.allclose(logits, raw @ model.encoder.embedding.weight.T + model.decoder.bias, atol=1e-6)
        assert sum(p.shape == (30, 6) for p in model.parameters()) == 1

    def test_loss_is_the_cross_entropy_of_the_logits_under_the_same_dropout(self) -> None:
        model = LanguageModel(encoder(input=0.2, hidden=0.2, output=0.4, embedding=0.1, weight=0.3))
        targets = tokens().roll(1, 1)
        torch.manual_seed(7)
        out = model.loss(tokens(), targets, ar_alpha=2, tar_beta=1, chunk=5)
        torch.manual_seed(7)
        logits, state = model(tokens())
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert out.cross_entropy.item() == pytest.approx(expected.item(), rel=1e-6)
        assert torch.equal(out.state[1][0], state[1][0])
        assert out.penalty > 0  # apart from the cross-entropy, which is reported

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_weights_of_another_precision(self, dtype: torch.dtype) -> None:
        model = LanguageModel(encoder())
        expected = model.loss(tokens(), tokens(), ar_alpha=2, tar_beta=1)
        model.to(dtype)
        state: State | None = None
        for _ in range(2):  # the second window starts from the first's state
            out = model.loss(tokens(), tokens(), state, ar_alpha=2, tar_beta=1)
            state = detach(out.state)
        first = model.loss(tokens(), tokens(), ar_alpha=2, tar_beta=1)
        assert first.cross_entropy.item() == pytest.approx(expected.cross_entropy.item(), rel=1e-2)
        assert first.penalty.item() == pytest.approx(expected.penalty.item(), rel=5e-2)
        (out.cross_entropy + out.penalty).backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())

    def test_total_nll_is_the_sum_in_float64_without_a_graph(self) -> None:
        model = LanguageModel(encoder()).eval()
        total, state = model.total_nll(tokens(), tokens().roll(1, 1), chunk=5)
        logits, _ = model(tokens())
        expected = F.cross_entropy(logits.flatten(0, 1).double(), tokens().roll(1, 1).flatten(), reduction="sum")
        assert total.dtype == torch.float64 and not total.requires_grad and not state[0][0].requires_grad
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_layer_groups_hold_each_parameter_once_lowest_first(self) -> None:
        model = LanguageModel(encoder())
        groups = [[id(p) for p in group.parameters()] for group in model.layer_groups()]
        assert groups[:3] == [[id(p) for p in rnn.parameters()] for rnn in model.encoder.rnns]
        assert groups[3] == [id(model.encoder.embedding.weight), id(model.decoder.bias)]
        assert sorted(i for group in groups for i in group) == sorted(id(p) for p in model.parameters())


class TestFrozenLayers:
    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_keep_nothing_for_a_backward_pass(self, weight: float) -> None:
        """No graph and no activations below the lowest layer that trains; its own gradient is as without freezing."""
        model, twin = encoder(weight=weight), encoder(weight=weight)
        model.embedding.requires_grad_(False)
        model.rnns[0].requires_grad_(False)

        def kept_by(network: AWDLSTM) -> int:
            sizes: list[int] = []
            torch.manual_seed(3)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
                network(tokens())[0].pow(2).sum().backward()
            return sum(sizes)

        outputs: list[Tensor] = []
        model.rnns[0].register_forward_hook(lambda *call: outputs.append(call[2][0]))
        assert kept_by(model) < kept_by(twin)
        assert not outputs[0].requires_grad
        assert all(p.grad is None for p in [*model.embedding.parameters(), *model.rnns[0].parameters()])
        for name, p in model.rnns[1].named_parameters():
            assert p.grad is not None and torch.allclose(p.grad, twin.rnns[1].get_parameter(name).grad, atol=1e-6)

    def test_all_frozen_builds_no_graph(self) -> None:
        assert not encoder(weight=0.5, hidden=0.3).requires_grad_(False)(tokens())[0].requires_grad


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.95])
def test_weight_dropout_keeps_the_mean_and_masks_the_gradient(rate: float) -> None:
    torch.manual_seed(0)
    weight = torch.rand(301, 333).add_(1).requires_grad_()  # not a multiple of four
    dropped = weight_dropout(weight, rate, True)
    kept = dropped != 0
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.01)
    scale = dropped[kept] / weight[kept]
    assert torch.allclose(scale, torch.full_like(scale, 1 / (1 - rate)), rtol=1e-3)
    dropped.sum().backward()
    assert weight.grad is not None and torch.allclose(weight.grad, kept / (1 - rate), rtol=1e-3)
    assert not torch.equal(kept, weight_dropout(weight, rate, True) != 0)
    rows, columns = kept.float().mean(1), kept.float().mean(0)
    assert (rows - (1 - rate)).abs().max() < 0.15 and (columns - (1 - rate)).abs().max() < 0.15  # no pattern
