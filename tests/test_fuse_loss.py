"""fuse_loss: language models of transformers whose loss and gradients stay what they were, without logits."""

import copy
import inspect
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import fastreg as fr

HINT = 'needs pip install "torch-fastreg[test]"'
transformers = pytest.importorskip("transformers", reason=HINT)
pytest.importorskip("accelerate", reason=HINT)

from fastreg.integrations.transformers import fuse_loss, loss, unfuse_loss  # noqa: E402

CLASSES = 203
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BOTH = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
BOTH |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0)
# {class: options of its config}. They differ in what they do between the last layer and the loss.
MODELS = {
    "GPT2LMHeadModel": dict(n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),  # tied weights
    "LlamaForCausalLM": SIZES | DECODER,
    "GraniteForCausalLM": SIZES | DECODER | dict(logits_scaling=3.0),  # divided
    "CohereForCausalLM": SIZES | DECODER | dict(logit_scale=0.3),  # multiplied
    "OPTForCausalLM": dict(SIZES, ffn_dim=48, word_embed_proj_dim=32),  # contiguous()
    "MixtralForCausalLM": SIZES | DECODER | dict(num_local_experts=2, output_router_logits=True),  # 2nd term
    "BertForMaskedLM": SIZES,  # a bias, and CrossEntropyLoss
    "DistilBertForMaskedLM": dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "ModernBertForMaskedLM": SIZES | dict(pad_token_id=0),
    "T5ForConditionalGeneration": dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4) | TOKENS,
    "BartForConditionalGeneration": BOTH | TOKENS,  # a further bias, added
}


def build(name):
    """The model with small random weights, without dropout, so that two runs are the same."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = model_class.config_class(vocab_size=CLASSES, **MODELS[name])
        return model_class(config).eval()


def batch(seed=1):
    ids = torch.randint(3, CLASSES, (3, 11), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = -100
    return dict(input_ids=ids, labels=labels)


def run(model, **inputs):
    """(loss, gradients, output) of a step."""
    model.zero_grad()
    output = model(**{**batch(), **inputs})
    value = output[0]
    value.backward()
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return value.detach(), {k: g.clone() for k, g in gradients.items() if g is not None}, output


def assert_equal(got, want, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(got[0], want[0], rtol=rtol / 10, atol=atol)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(
            got[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def models():
    """Each model once; a test leaves it as it was."""
    built = {}
    return lambda name: built[name] if name in built else built.setdefault(name, build(name))


@pytest.fixture
def gpt2(models):
    yield models("GPT2LMHeadModel")
    unfuse_loss(models("GPT2LMHeadModel"))


def is_made(output):
    return isinstance(output.logits, torch.Tensor)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", [{}, dict(num_items_in_batch=torch.tensor(17)), dict(return_dict=False)])
def test_loss_and_gradients_of_the_model(name, form, models):
    model = models(name)
    if "num_items_in_batch" in form and "kwargs" not in inspect.signature(type(model).forward).parameters:
        form = {}
    want = run(model, **form)
    assert fuse_loss(model) is model
    got = run(model, **form)
    assert_equal(got, want)
    if "return_dict" not in form:
        assert is_made(want[2]) and not is_made(got[2])
        torch.testing.assert_close(got[2].logits.tensor(), want[2].logits)
    assert unfuse_loss(model) is model
    assert torch.equal(run(model, **form)[0], want[0]) and is_made(run(model)[2])


def test_the_logits_are_never_there(gpt2):
    """No tensor as large as they are is made by the step."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.seen = max([self.seen, *(t.numel() for t in tensors if t.shape[-1:] == (CLASSES,))])
            return result

    ids = torch.randint(3, CLASSES, (4, 256))
    for fused in (False, True):
        if fused:
            fuse_loss(gpt2)
        with Largest() as largest:
            gpt2(input_ids=ids, labels=ids).loss.backward()
        assert (largest.seen < ids.numel() * CLASSES) is fused


def test_options(gpt2):
    logits = gpt2(input_ids=batch()["input_ids"]).logits[:, :-1].reshape(-1, CLASSES)
    target = batch()["labels"][:, 1:].reshape(-1)
    for options in (dict(label_smoothing=0.1), dict(label_smoothing=0.2, smoothing="others", z_loss=1e-3)):
        fuse_loss(gpt2, **options)
        want = fr.cross_entropy(logits, target, **options)
        torch.testing.assert_close(run(gpt2)[0], want.detach(), rtol=1e-5, atol=1e-6)
    for options, error in ((dict(label_smoothing=1.5), ValueError), (dict(smoothing="all"), ValueError)):
        with pytest.raises(error, match="fuse_loss: "):
            fuse_loss(gpt2, **options)
    assert len(gpt2._forward_hooks) == 1  # called twice, fused once


def test_without_gradients_or_labels_nothing_changes(gpt2):
    fuse_loss(gpt2)
    with torch.no_grad():
        assert is_made(gpt2(**batch()))
    assert is_made(gpt2(input_ids=batch()["input_ids"]))
    gpt2.generation_config.pad_token_id = 0
    assert gpt2.generate(batch()["input_ids"][:1], max_new_tokens=3, do_sample=False).shape[1] <= 14


def test_the_logits_of_the_output_are_made_when_they_are_looked_at(gpt2):
    want = gpt2(input_ids=batch()["input_ids"]).logits
    fuse_loss(gpt2)
    logits = gpt2(**batch()).logits
    assert logits.shape == want.shape and logits.size(-1) == CLASSES and logits.dim() == 3 == logits.ndim
    assert logits.dtype == want.dtype and logits.device == want.device and logits.requires_grad
    assert len(logits) == 3 and logits.numel() == want.numel() and "3, 11, 203" in repr(logits)
    for look in (
        lambda x: x.softmax(-1),
        lambda x: torch.argmax(x, -1),
        lambda x: x - 1,
        lambda x: 2 / x,
        lambda x: x > 0.1,
        lambda x: torch.cat([x, x]),
        lambda x: x[0, 1, 2],
        lambda x: x[..., 5],
        lambda x: x.transpose(1, 2),
        lambda x: x.view(-1),
        lambda x: x.mean(),
        lambda x: torch.stack(list(x)),
        lambda x: torch.from_numpy(x.detach().numpy()),
        lambda x: x[:, -1].tensor() if not isinstance(x, torch.Tensor) else x[:, -1],
        lambda x: x[batch()["labels"] != -100] * 1.0 - 0,
        lambda x: x.flatten(0, 1).to(torch.float64) - 0,
        lambda x: nn.functional.cross_entropy(x.transpose(1, 2), batch()["input_ids"]),
    ):
        got = look(logits)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, look(want))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        logits.nothing  # noqa: B018


def test_a_step_that_needs_the_logits_is_named():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(vocab_size=CLASSES, head_dim=8, **SIZES, **DECODER)
    model = fuse_loss(transformers.Gemma2ForCausalLM(config))
    with pytest.raises(RuntimeError, match=r"fuse_loss: .* got tanh, which needs them; call unfuse_loss"):
        model(**batch())
    assert is_made(model(input_ids=batch()["input_ids"]))  # the model is no longer running


def test_what_is_no_language_model_is_refused(gpt2):
    config = transformers.BertConfig(vocab_size=CLASSES, **SIZES)
    for model, text in (
        (transformers.BertForSequenceClassification(config), "has none; take a class for language models"),
        (transformers.BertModel(config), "has none"),
        (nn.Linear(2, 3), "has none"),
    ):
        with pytest.raises(TypeError, match=f"fuse_loss: .*{text}"):
            fuse_loss(model)
    with pytest.raises(TypeError, match=r"fuse_loss: model must be a torch.nn.Module, got str"):
        fuse_loss("gpt2")
    changed = copy.deepcopy(gpt2)
    changed.lm_head = nn.Sequential(changed.lm_head)
    with pytest.raises(
        TypeError, match=r"fuse_loss: the output layer must be a torch.nn.Linear, got Sequential"
    ):
        fuse_loss(changed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_layer_of_their_own(copied, gpt2):
    want = run(gpt2)
    fuse_loss(gpt2)
    other = copied(gpt2)
    assert_equal(run(other), want)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert run(other)[0] != want[0]
    unfuse_loss(other)
    assert is_made(run(other)[2]) and not is_made(run(gpt2)[2])
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    assert not any(getattr(other, name) for name in hooks)
    assert gpt2.state_dict().keys() == other.state_dict().keys()


def test_new_embeddings(models):
    model = fuse_loss(copy.deepcopy(models("LlamaForCausalLM")))
    model.resize_token_embeddings(CLASSES + 7)
    output = run(model)[2]
    assert not is_made(output) and output.logits.shape[-1] == CLASSES + 7


def test_autocast_patch_and_checkpoints(gpt2):
    with torch.autocast("cpu", torch.bfloat16):
        want = run(gpt2)
        fuse_loss(gpt2)
        got = run(gpt2)
    assert got[0].dtype == want[0].dtype == torch.float32 and got[2].logits.dtype == want[2].logits.dtype
    assert_equal(got, want, rtol=5e-2, atol=5e-3)
    want = run(unfuse_loss(gpt2))
    fuse_loss(gpt2)
    with fr.patched():
        assert_equal(run(gpt2), want)
    gpt2.train()
    gpt2.gradient_checkpointing_enable(dict(use_reentrant=False))
    for module in gpt2.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_equal(run(gpt2), want)
    gpt2.gradient_checkpointing_disable()
    gpt2.eval()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half, models):
    model = copy.deepcopy(models("LlamaForCausalLM")).to(half)
    want = run(model)
    got = run(fuse_loss(model))
    assert got[0].dtype == want[0].dtype
    assert_equal(got, want, rtol=0.1, atol=2e-3)


def test_compiled(models):
    model = models("LlamaForCausalLM")
    want = run(model)
    fuse_loss(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: model(**inputs).loss, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    value = compiled(batch())
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_equal((value.detach(), gradients), want)
    unfuse_loss(model)
    fuse_loss(torch.compile(model, backend="eager"))  # what others have put around it is seen through
    assert not is_made(run(model)[2])
    unfuse_loss(model)
    torch._dynamo.reset()


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, CLASSES, (9,), generator=torch.Generator().manual_seed(index))
        return dict(input_ids=ids, labels=torch.where(torch.arange(9) < index % 3, -100, ids))


@pytest.mark.parametrize("way", ["model's", "accumulated", "compute_loss_func"])
def test_trainer(way, models, tmp_path):
    """The weights after a training with and without."""
    options = dict(gradient_accumulation_steps=2) if way == "accumulated" else {}
    if way == "compute_loss_func":
        options |= dict(remove_unused_columns=False)
    trained = []
    for fused in (False, True):
        model = copy.deepcopy(models("LlamaForCausalLM"))
        if fused:
            fuse_loss(model, always=way == "compute_loss_func")
        fixed = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", seed=3)
        fixed |= dict(save_strategy="no", per_device_train_batch_size=2, num_train_epochs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **fixed, **options)
            func = loss(label_smoothing=0.1) if way == "compute_loss_func" else None
            trainer = transformers.Trainer(
                model, arguments, train_dataset=Tokens(), eval_dataset=Tokens(), compute_loss_func=func
            )
            trainer.train()
            scores = trainer.evaluate()
        trained.append((model.state_dict(), scores["eval_loss"]))
    for name, value in trained[0][0].items():
        torch.testing.assert_close(trained[1][0][name], value, rtol=1e-4, atol=1e-5)
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-5)


def test_always_is_for_losses_outside_of_the_model(gpt2):
    want = run(gpt2)[0]
    fuse_loss(gpt2, always=True)
    ids, labels = batch()["input_ids"], batch()["labels"]
    assert is_made(gpt2(input_ids=ids))  # not in evaluation
    gpt2.train()
    for module in gpt2.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output = gpt2(input_ids=ids)
    gpt2.eval()
    assert not is_made(output)
    for value in (
        loss(shift=True)(output, labels),
        nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, CLASSES), labels[:, 1:].reshape(-1)),
    ):
        torch.testing.assert_close(value.detach(), want, rtol=1e-5, atol=1e-6)


def test_logits_that_are_gone_or_would_be_lost_are_errors(gpt2):
    model = fuse_loss(copy.deepcopy(gpt2))
    output = model(**batch())
    logits = output.logits
    for change in (
        lambda x: x.div_(2),
        lambda x: torch.clamp_(x, 0),
        lambda x: x.__setitem__((0, 0), 0.0),
        lambda x: x.retain_grad(),
        lambda x: x.register_hook(print),
    ):
        with pytest.raises(RuntimeError, match=r"fuse_loss: .*take logits = output.logits.tensor\(\) first"):
            change(logits)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for look in (lambda: logits.tensor(), lambda: logits[:, :-1], lambda: logits.argmax(-1)):
        with pytest.raises(RuntimeError, match=r"fuse_loss: .*before optimizer.step\(\)"):
            look()


def test_ways_to_write_a_step(gpt2):
    mask = batch()["labels"].ne(-100)
    want = gpt2(input_ids=batch()["input_ids"]).logits
    logits = fuse_loss(gpt2)(**batch()).logits
    for look in (
        lambda x: x[0, 0, 5, ...],
        lambda x: x[:, :, 2:5, ...],
        lambda x: x[mask.numpy()] + 0 * x[mask],
        lambda x: x[mask[..., None].expand(x.shape).numpy()],
        lambda x: x.reshape(shape=(-1, CLASSES)) - 0,
        lambda x: torch.add(x, torch.ones(CLASSES), alpha=3),
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        lambda x: torch.mul(input=x, other=2),
        lambda x: x // 2,
        lambda x: x % 2,
    ):
        got = look(logits)
        got = got if isinstance(got, torch.Tensor) else got.tensor()
        torch.testing.assert_close(got, look(want))
    with pytest.raises(RuntimeError, match="Boolean value"):
        bool(logits)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BartForConditionalGeneration"])
def test_logits_after_autocast(name, models):
    """They are what they were under it."""
    model = models(name)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**batch()).logits
        logits = fuse_loss(model)(**batch()).logits
    unfuse_loss(model)
    assert logits.dtype == want.dtype == logits.tensor().dtype
    torch.testing.assert_close(logits.tensor(), want)


def test_a_layer_that_somebody_changed_is_refused(gpt2):
    model = copy.deepcopy(gpt2)
    before = model.lm_head.forward
    model.lm_head.forward = lambda x: before(x) * 3
    with pytest.raises(TypeError, match="fuse_loss: the output layer must have the forward method of its"):
        fuse_loss(model)
    assert "forward" in vars(model.lm_head) and not model._forward_hooks


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_batch_without_labels(name, models):
    """Trainer divides by the number of labels: the loss is NaN, and the gradients are 0 all the same."""
    model = models(name)
    form = dict(labels=torch.full((3, 11), -100), num_items_in_batch=torch.tensor(0))
    want, got = run(model, **form), run(fuse_loss(model), **form)
    unfuse_loss(model)
    assert got[0].isnan() and want[0].isnan() and got[1].keys() == want[1].keys()
    assert not any(gradient.any() for gradient in got[1].values())


class Around(nn.Module):
    """Calls the model's forward method, as PeftModel did for long, and no hooks with it."""

    def __init__(self, model):
        super().__init__()
        self.base = model

    def get_base_model(self):
        return self.base

    def forward(self, *args, **kwargs):
        return self.base.forward(*args, **kwargs)


def test_a_model_whose_forward_method_is_called_by_another(gpt2):
    model = Around(gpt2)
    assert fuse_loss(model) is model and not is_made(model(**batch()))
    unfuse_loss(gpt2)
    assert is_made(model(**batch())) and is_made(gpt2(**batch()))
    assert not is_made(fuse_loss(model)(**batch()))
    assert is_made(unfuse_loss(model)(**batch())) and not model._forward_hooks


def test_replicas_of_data_parallel(gpt2):
    """Each computes the loss with a layer of its own, and from the logits, which are gathered."""
    model = fuse_loss(copy.deepcopy(gpt2))
    replica, layer = model._replicate_for_data_parallel(), model.lm_head._replicate_for_data_parallel()
    layer.weight, layer._parameters["bias"] = model.lm_head.weight.detach() * 2, None
    replica._modules["lm_head"] = replica.lm_head = layer
    with pytest.warns(RuntimeWarning, match="fuse_loss: torch.nn.DataParallel .* use Distributed"):
        output = replica(**batch())
    torch.testing.assert_close(output.logits, 2 * gpt2(input_ids=batch()["input_ids"]).logits)
    assert not is_made(model(**batch()))


def test_threads(gpt2):
    """One evaluates while the other one is in the middle of a step."""
    fuse_loss(gpt2)
    made = []

    def evaluate(*_):
        if not made:
            made.append(None)
            thread = threading.Thread(target=lambda: made.append(gpt2.lm_head(torch.zeros(1, 32))))
            thread.start()
            thread.join()

    handle = gpt2.transformer.register_forward_hook(evaluate)
    output = gpt2(**batch())
    handle.remove()
    assert isinstance(made[1], torch.Tensor) and not is_made(output)
