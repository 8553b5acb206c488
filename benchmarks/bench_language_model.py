"""A training step of small language models of transformers, where it is installed: with the loss as the model
computes it from its logits, and after `fastreg.integrations.transformers.fuse_loss`, which never holds them.
The optimiser is torch's on both sides. The memory is a share of the stock step's.
"""

import copy
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch

from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

TOKENS, VOCABULARY = {"full": (4, 512), "quick": (2, 128), "tiny": (2, 8)}, 32000
TARGETS = Targets(eager=1.1, peak=0.5)


def _gpt2(vocabulary, width):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=4, n_head=4, n_positions=512)
    )


def _llama(vocabulary, width):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    )


MODELS = {"GPT-2": _gpt2, "Llama": _llama}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    batch, length = TOKENS[scale]
    width, vocabulary = (16, 100) if scale == "tiny" else (256, VOCABULARY)
    for name, make in MODELS.items() if find_spec("transformers") else ():
        for dtype in _timing.DTYPES:
            yield Case(
                "language_model",
                f"training step of a small {name}",
                f"{batch} × {length} tokens of {vocabulary:,}",
                batch * length,
                dtype,
                partial(_build, make, vocabulary, width, batch, length, dtype),
                targets=TARGETS if scale == "full" else Targets(),
                rounds=3,
                scales=False,
            )


def _build(make, vocabulary, width, batch, length, dtype, device):
    from fastreg.integrations.transformers import fuse_loss

    stock = make(vocabulary, width).to(device, dtype).eval()  # without dropout, so that both do the same
    ours = make(vocabulary, width).to(device, dtype).eval()
    ours.load_state_dict(stock.state_dict())
    fuse_loss(ours)
    tokens = torch.randint(vocabulary, (batch, length), device=device)

    def loss_of(model):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def check():
        losses = loss_of(ours), loss_of(stock)
        tolerance = _timing.tolerance(dtype)
        torch.testing.assert_close(*losses, rtol=tolerance, atol=0, check_dtype=False)
        for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
            error = ((a.grad - b.grad).norm() / b.grad.norm()).item()
            assert error < 10 * tolerance, f"a gradient is off by {error:.1e} of its norm"

    def stepper(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)

        def step():
            optimizer.zero_grad()
            loss_of(model)
            optimizer.step()

        return step

    peak = _timing.peak_bytes(
        stepper(copy.deepcopy(stock)), device
    )  # of a copy: its steps change the weights
    sides = {"fastreg": stepper(ours), "torch": stepper(stock)}
    return Work(sides, check, peak_of=("stock", peak))


if __name__ == "__main__":
    _timing.run_alone("language_model")
