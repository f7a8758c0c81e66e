"""UnpaddedModel and accelerate against transformers' models: values in fp32."""

import copy
import gc
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import MINILM, write_bert, write_nomic
from support.family_checks import of_transformers
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    NomicBertModel,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import unpadded
from unpadded.integrations.accelerate import accelerate, restore
from unpadded.integrations.transformers import UnpaddedModel

LENGTHS = torch.tensor([[20], [1], [7], [3]])
COLUMNS = torch.arange(20)
MASKS = {
    "none": None,
    "right": COLUMNS < LENGTHS,
    "left": COLUMNS >= 20 - LENGTHS,
    "holes": (COLUMNS + LENGTHS) % 3 > 0,
    "a text of padding": (COLUMNS < LENGTHS) & (LENGTHS > 1),
}
SENTENCES = ["search_query: What is TSNE?", "search_query: Who is Laurens van der Maaten?", "search_query: Hm " * 40]


@pytest.fixture(scope="module", params=["nomic_bert", "bert"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_bert(folder) if request.param == "bert" else write_nomic(folder, names="transformers")


@pytest.fixture
def original(folder):
    """transformers' model of the folder."""
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture
def ids(seed):
    return torch.randint(5, 30000, (4, 20))


def assert_same(actual, expected, mask, tolerance=1e-5):
    """Assert a small relative Frobenius error over the tokens that the mask keeps, and zeros elsewhere."""
    kept = torch.ones(actual.shape[:2], dtype=torch.bool) if mask is None else mask
    error = (actual[kept].double() - expected[kept].double()).norm() / expected[kept].double().norm()
    assert error <= tolerance
    assert not actual[~kept].any()


@pytest.mark.parametrize("padding", MASKS)
def test_hidden_states_match_transformers(folder, original, ids, padding):
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    output = UnpaddedModel.from_pretrained(folder)(ids, given, output_hidden_states=True)
    with torch.no_grad():
        expected = original(ids, given, output_hidden_states=True)
    assert_same(output.last_hidden_state, expected.last_hidden_state, mask)
    assert len(output.hidden_states) == len(expected.hidden_states)
    for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_same(state, expected_state, mask)


def test_position_ids(folder, original, ids):
    """One row for all texts, or one row per text."""
    mask = MASKS["right"]
    model, accelerated = UnpaddedModel.from_pretrained(folder), accelerate(copy.deepcopy(original))
    for positions in (COLUMNS[None], 19 - COLUMNS[None], (COLUMNS + 3 * LENGTHS).flip(1)):
        with torch.no_grad():
            # NomicBert does not broadcast one row of positions over several texts
            expected = original(ids, mask.long(), position_ids=positions.expand(4, -1))[0]
            for one in (model, accelerated):
                assert_same(one(ids, mask.long(), position_ids=positions)[0], expected, mask)


def mean_pooling(model_output, attention_mask):
    """The function of the model card."""
    token_embeddings = model_output[0]
    expanded = attention_mask.unsqueeze(-1).expand(token_embeddings.size()).float()
    return torch.sum(token_embeddings * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)


def card_example(model, tokenizer, sentences):
    encoded = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        model_output = model(**encoded)
    return F.normalize(mean_pooling(model_output, encoded["attention_mask"]), p=2, dim=1)


def test_the_card_example_runs(folder, original):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = card_example(UnpaddedModel.from_pretrained(folder, trust_remote_code=True), tokenizer, SENTENCES)
    torch.testing.assert_close(found, card_example(original, tokenizer, SENTENCES), atol=1e-6, rtol=0)


def test_the_card_example_past_the_trained_length(tmp_path):
    """With rotary_scaling_factor=2, each text equals what transformers computes for it alone."""
    scaled = write_nomic(tmp_path / "scaled", names="transformers", trained_length=64, scaling_factor=2.0)
    plain = write_nomic(tmp_path / "plain", trained_length=64)
    tokenizer = AutoTokenizer.from_pretrained(plain, model_max_length=8192)
    model = UnpaddedModel.from_pretrained(plain, trust_remote_code=True, rotary_scaling_factor=2)
    found = card_example(model, tokenizer, SENTENCES)
    for text, row in zip(SENTENCES, found, strict=True):
        fresh = NomicBertModel.from_pretrained(scaled).eval()
        torch.testing.assert_close(row, card_example(fresh, tokenizer, [text])[0], atol=1e-6, rtol=0)
    unscaled = card_example(UnpaddedModel.from_pretrained(plain), tokenizer, SENTENCES)
    assert [torch.equal(*rows) for rows in zip(found, unscaled, strict=True)] == [True, True, False]


def test_the_feature_extraction_pipeline_runs_the_model():
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    packed = pipeline(
        "feature-extraction", device="cpu", model=UnpaddedModel.from_pretrained(MINILM), tokenizer=tokenizer
    )
    original = pipeline(
        "feature-extraction", device="cpu", model=AutoModel.from_pretrained(MINILM), tokenizer=tokenizer
    )
    torch.testing.assert_close(packed("Some text."), original("Some text."), atol=1e-5, rtol=0)
    batch = zip(packed(SENTENCES, batch_size=2), original(SENTENCES, batch_size=2), strict=True)
    for row, expected in batch:
        expected = torch.tensor(expected)
        kept = torch.tensor(row).abs().sum(-1) > 0
        torch.testing.assert_close(torch.tensor(row)[kept], expected[kept], atol=1e-5, rtol=0)


def test_the_model_is_a_module(folder, ids):
    model = UnpaddedModel.from_pretrained(folder)
    exact = model(ids)
    assert (model.device.type, model.dtype, exact[0].dtype) == ("cpu", torch.float32, torch.float32)
    assert isinstance(exact, type(model(input_ids=ids))) and exact.pooler_output is None
    assert model.config.hidden_size == exact[0].shape[2]
    assert torch.equal(model(ids, return_dict=False)[0], exact[0])
    stored = sum(
        parameter.numel() for parameter in AutoModel.from_pretrained(folder, add_pooling_layer=False).parameters()
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == stored
    assert torch.equal(copy.deepcopy(model)(ids)[0], exact[0])
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert_same(model(ids)[0], exact[0], None, tolerance=2e-2)
    assert model.half()(ids)[0].dtype == torch.float16
    assert UnpaddedModel.from_pretrained(folder, dtype=torch.bfloat16)(ids)[0].dtype == torch.bfloat16


def test_the_model_uses_a_loaded_state_dict(folder, ids):
    model, other = UnpaddedModel.from_pretrained(folder), UnpaddedModel.from_pretrained(folder)
    state = {name: parameter * 1.1 for name, parameter in other.state_dict().items()}
    other.load_state_dict(state)
    assert not torch.equal(other(ids)[0], model(ids)[0])
    nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{name}": value for name, value in state.items()})
    assert torch.equal(other(ids)[0], model(ids)[0])
    assert torch.equal(other.bfloat16().float()(ids)[0], copy.deepcopy(other)(ids)[0])


def test_the_stored_dtype_is_the_default(tmp_path):
    assert UnpaddedModel.from_pretrained(write_nomic(tmp_path, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_saved_model_is_loaded_by_transformers(folder, original, ids, tmp_path):
    UnpaddedModel.from_pretrained(folder).save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(ids)[0], original(ids)[0])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"inputs_embeds": torch.zeros(4, 20, 128)}, "both input_ids and inputs_embeds .*pass one"),
        ({"position_ids": torch.zeros(4, 19, dtype=torch.long)}, r"position_ids .*shape \(4, 19\)"),
        ({"position_ids": torch.full((4, 20), -1)}, "position_ids contain -1"),
        ({"token_type_ids": torch.full((4, 20), 2)}, "token_type_ids contain 2.* 0 to 1"),
        ({"token_type_ids": torch.full((4, 20), -1)}, "token_type_ids contain -1.* 0 to 1"),
        ({"token_type_ids": torch.ones(3, 20, dtype=torch.long)}, r"token_type_ids .*shape \(3, 20\)"),
        ({"token_type_ids": torch.ones(4, 20)}, "token_type_ids are torch.float32"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(4, 19)}, r"attention_mask has shape \(4, 19\)"),
        ({"attention_mask": torch.ones(4, 1, 20, 20)}, "attention_mask has shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_arguments_raise(folder, ids, arguments, reason):
    model = UnpaddedModel.from_pretrained(folder)
    with pytest.raises(unpadded.UnpaddedError, match=reason):
        model(ids, **arguments)


def test_inputs_embeds_of_a_wrong_shape_raise(folder):
    model = UnpaddedModel.from_pretrained(folder)
    for embeds in (torch.zeros(4, 20, 127), torch.zeros(20, 128), torch.zeros(4, 20, 128, dtype=torch.long)):
        with pytest.raises(unpadded.InputError, match=r"\[batch, length, 128\]"):
            model(inputs_embeds=embeds)
    with pytest.raises(unpadded.InputError, match="neither input_ids nor inputs_embeds"):
        model(attention_mask=torch.ones(4, 20))


def test_ids_out_of_range_raise(folder, ids):
    model = UnpaddedModel.from_pretrained(folder)
    with pytest.raises(unpadded.InputError, match="input_ids contain 99999"):
        model(ids.index_fill(1, torch.tensor([3]), 99999))
    with pytest.raises(unpadded.InputError, match="input_ids contain -1"):
        model(ids.index_fill(1, torch.tensor([3]), -1))
    with pytest.raises(unpadded.InputError, match="integers"):
        model(ids.float())


def test_positions_beyond_the_table_raise(tmp_path):
    model = UnpaddedModel.from_pretrained(write_bert(tmp_path, positions=16))
    with pytest.raises(unpadded.InputError, match=r"position 19.* 16 .*truncation=True"):
        model(torch.full((1, 20), 7))


def test_training_mode_and_unknown_arguments_raise(folder, ids):
    with pytest.raises(unpadded.OptionError, match="training mode"):
        UnpaddedModel.from_pretrained(folder).train()(ids)
    with pytest.raises(unpadded.OptionError, match="quantization_config"):
        UnpaddedModel.from_pretrained(folder, quantization_config={})


def test_a_batch_of_padding_gives_zeros(folder):
    model, ids = UnpaddedModel.from_pretrained(folder), torch.zeros(2, 5, dtype=torch.long)
    output = model(ids, torch.zeros(2, 5, dtype=torch.bfloat16))
    assert output[0].shape[:2] == (2, 5) and not output[0].any()


def memory(model):
    """Return the bytes of the distinct storages of a model's parameters."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def seeded(family):
    """A small transformers model of a family in fp32, with weights large enough to matter next to the residual."""
    torch.manual_seed(0)
    types = {"type_vocab_size": 3}
    name, own = {
        "bert": ("Bert", types),
        "distilbert": ("DistilBert", {"hidden_dim": 128}),
        "eurobert": ("EuroBert", {"num_key_value_heads": 2}),
        "gte": ("Gte", types),
        "gte without types": ("Gte", {"type_vocab_size": 0}),
        "modernbert": ("ModernBert", {"local_attention": 8}),
        "mpnet": ("MPNet", {"max_position_embeddings": 514}),
        "nomic_bert": ("NomicBert", types),
        "xlm_roberta": ("XLMRoberta", types | {"max_position_embeddings": 514}),
    }[family]
    config, model = of_transformers(f"{name}Config", f"{name}Model")
    small = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    made = model(config(**small, **own, vocab_size=30528, pad_token_id=1)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return made


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_an_accelerated_model_matches_transformers(folder, original, ids, padding):
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    model = accelerate(copy.deepcopy(original))
    assert memory(model) == memory(original)
    with torch.no_grad():
        output, expected = (
            model(ids, given, output_hidden_states=True),
            original(ids, given, output_hidden_states=True),
        )
        assert_same(output[0], expected[0], mask)
        assert_same(output.hidden_states[1], expected.hidden_states[1], mask)
        if original.config.model_type == "bert" and padding != "left":  # transformers pools a padding token there
            torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
        assert torch.equal(model(ids, given, return_dict=False)[0], output[0])


@pytest.mark.parametrize("family", ["distilbert", "gte", "modernbert", "mpnet", "xlm_roberta"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_other_families_match_transformers(ids, family, padding, tmp_path):
    original = seeded(family)
    ids = ids if MASKS[padding] is None else ids.where(MASKS[padding], original.config.pad_token_id)
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    original.save_pretrained(tmp_path)
    packed = UnpaddedModel.from_pretrained(tmp_path)
    accelerated = accelerate(copy.deepcopy(original))
    with torch.no_grad():
        expected = original(ids, given, output_hidden_states=True)
        for model in (packed, accelerated):
            output = model(ids, given, output_hidden_states=True)
            assert_same(output[0], expected[0], mask)
            for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_same(state, expected_state, mask)


TRIOS = "bert,distilbert,eurobert,gte,gte without types,modernbert,mpnet,nomic_bert,xlm_roberta"


@pytest.fixture(scope="module", params=TRIOS.split(","))
def trio(request, tmp_path_factory):
    """A transformers model of a family, its checkpoint as an UnpaddedModel, and a copy of it accelerated."""
    folder, original = tmp_path_factory.mktemp("checkpoint"), seeded(request.param)
    original.save_pretrained(folder)
    return original, UnpaddedModel.from_pretrained(folder), accelerate(copy.deepcopy(original))


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("types", [False, True], ids=["", "types"])
@pytest.mark.parametrize("words", ["input_ids", "inputs_embeds"])
def test_token_types_and_inputs_embeds(trio, ids, words, types, padding, caplog):
    """All hidden states match transformers. Models without token types ignore them."""
    original, *packed = trio
    mask = MASKS[padding]
    if padding == "holes" and original.config.model_type in ("modernbert", "mpnet"):
        pytest.skip("gaps in the mask are not supported with attention by distance")
    given = {"attention_mask": None if mask is None else mask.long(), "output_hidden_states": True}
    given[words] = ids if words == "input_ids" else 0.15 * torch.randn(4, 20, 64)
    if types:
        given["token_type_ids"] = torch.randint(3, (4, 20))
    with torch.no_grad():
        expected = original(**given)
        for model in packed:
            output = model(**given)
            assert_same(output[0], expected[0], mask)
            for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_same(state, expected_state, mask)
    assert not caplog.records


def test_word_embeddings_as_inputs_embeds_give_the_bits_of_input_ids(trio, ids):
    """Also with another dtype, strided, and with a gradient, which is not propagated."""
    original, *packed = trio
    mask = MASKS["left"]
    embeds = original.get_input_embeddings()(ids)
    assert embeds.requires_grad
    strided = embeds.detach().repeat_interleave(2, dim=2)[..., ::2]
    for model in packed:
        with torch.set_grad_enabled(isinstance(model, UnpaddedModel)):
            expected = model(ids, mask)[0]
            if original.config.model_type == "xlm_roberta":  # its positions depend on the ids
                expected = model(ids, mask, position_ids=COLUMNS[None] + 2)[0]
            for given in (embeds, embeds.double(), strided):
                found = model(inputs_embeds=given, attention_mask=mask)[0]
                assert torch.equal(found, expected) and not found.requires_grad


def test_inputs_embeds_with_position_ids_and_one_row_of_token_types(trio):
    original, *packed = trio
    given = {"inputs_embeds": torch.randn(4, 20, 64), "attention_mask": MASKS["right"].long()}
    given["token_type_ids"] = torch.randint(3, (1, 20))
    with torch.no_grad():
        for positions in (19 - COLUMNS[None], (COLUMNS + 3 * LENGTHS).flip(1)):
            given["position_ids"] = positions
            # NomicBert does not broadcast one row of positions over several texts
            expected = original(**given | {"position_ids": positions.expand(4, -1)})[0]
            for model in packed:
                assert_same(model(**given)[0], expected, MASKS["right"])


@pytest.mark.gpu
def test_token_types_and_inputs_embeds_on_the_gpu(trio, ids):
    """The inputs may be on either device."""
    original, *packed = trio
    mask = MASKS["right"]
    for words in ({"input_ids": ids}, {"inputs_embeds": 0.15 * torch.randn(4, 20, 64)}):
        given = {"attention_mask": mask.long(), "token_type_ids": torch.randint(3, (4, 20)), **words}
        with torch.no_grad():
            expected = original(**given)[0]
            for model in packed:
                moved = copy.deepcopy(model).to("cuda")
                for device in ("cpu", "cuda"):
                    found = moved(**{name: tensor.to(device) for name, tensor in given.items()})[0]
                    assert_same(found.cpu(), expected, mask)


def test_restore_undoes_accelerate(original, ids):
    model = accelerate(copy.deepcopy(original))
    assert restore(model) is model
    assert vars(model).keys() == vars(original).keys()
    with torch.no_grad():
        assert torch.equal(model(ids)[0], original(ids)[0])
    pointers = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    with pytest.raises(unpadded.OptionError, match="is not accelerated"):
        restore(model)


def test_an_accelerated_model_uses_its_current_weights(original, ids):
    """After an in-place change, a cast, a copy, a load of a state dict and a change of the vocabulary."""
    model = accelerate(copy.deepcopy(original))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids)[0]
        for parameter in (*copied.parameters(), *original.parameters()):
            parameter.mul_(1.1)
        assert torch.equal(model(ids)[0], before)
        assert_same(copied(ids)[0], original(ids)[0], None)
        model.load_state_dict(copied.state_dict())
        assert torch.equal(model(ids)[0], copied(ids)[0])
        assert_same(model.double().float()(ids)[0], original(ids)[0], None)
        assert model.bfloat16()(ids)[0].dtype == torch.bfloat16
        ids[0, 0] = 30590
        for one in (model.float(), original):
            one.resize_token_embeddings(30600)
            one.get_input_embeddings().weight[30590:] = 0.1
        model.load_state_dict(original.state_dict())
        assert_same(model(ids)[0], original(ids)[0], None)


def test_an_accelerated_model_can_be_saved(original, ids, tmp_path):
    accelerate(copy.deepcopy(original)).save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(original).from_pretrained(tmp_path).eval()(ids)[0], original(ids)[0])


def test_an_accelerated_model_runs_its_own_forward_pass_and_logs_why_once(original, ids, caplog):
    model = accelerate(copy.deepcopy(original))
    original.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    embeds = original.get_input_embeddings()(ids).detach()
    given = {"token_type_ids": torch.ones_like(ids), "output_attentions": True}
    with caplog.at_level(logging.WARNING, "unpadded"), torch.no_grad():
        assert torch.equal(model(ids, **given)[0], original(ids, **given)[0])
        assert torch.equal(model(inputs_embeds=embeds, **given)[0], original(inputs_embeds=embeds, **given)[0])
        assert len(model(ids, **given).attentions) == 2
    assert len(caplog.records) == 1 and "output_attentions" in caplog.text
    assert model.train()(ids)[0].requires_grad
    assert "training mode" in caplog.text


def test_an_accelerated_model_has_gradients(original, ids, caplog):
    """Compare those of its parameters, and of embeddings if those are frozen."""
    model = accelerate(copy.deepcopy(original))
    for one in (model, original):
        one(ids)[0].square().sum().backward()
    for parameter, expected in zip(model.parameters(), original.parameters(), strict=True):
        assert parameter.grad is expected.grad is None or torch.equal(parameter.grad, expected.grad)
    assert "gradients are recorded; call it under torch.no_grad()" in caplog.text
    model.requires_grad_(False)
    assert not model(ids)[0].requires_grad
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds)[0].square().sum().backward()
    assert embeds.grad.abs().sum() > 0 and len(caplog.records) == 1


def python_calls(run):
    """Return how many Python functions run() calls."""
    events = []
    gc.disable()  # its callbacks, of which hypothesis adds one, would count
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return events.count("call")


@torch.no_grad()
def test_an_accelerated_model_checks_its_weights_without_a_python_call_per_layer(ids, monkeypatch):
    hidden = BaseModelOutputWithPooling(last_hidden_state=torch.zeros(4, 20, 64))
    monkeypatch.setattr("unpadded.integrations.accelerate.run_padded", lambda *_, **__: copy.copy(hidden))
    shallow, deep = (accelerate(small_bert(num_hidden_layers=layers)) for layers in (1, 4))
    calls = []
    for model in (shallow, deep):
        model(ids)
        calls.append(python_calls(lambda: model(ids)))  # noqa: B023
    assert calls[0] == calls[1]


class Doubled(nn.Module):
    """A module around a linear, as an adapter is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x) * 2


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def replace_linear(model, linear):
    name = next(name for name, module in model.named_modules() if module is linear)
    model.set_submodule(name, Doubled(linear))


def patch_forward(model, linear):
    linear.forward = lambda x: F.linear(x, linear.weight * 2)


def drop_layer(model, linear):
    del next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1]


CHANGES = {
    "a hook": lambda model, linear: linear.register_forward_hook(lambda module, x, y: y * 2),
    "a hook before": lambda model, linear: linear.register_forward_pre_hook(lambda module, x: (x[0] * 2,)),
    "a hook of all modules": lambda model, linear: nn.modules.module.register_module_forward_hook(
        lambda module, x, y: y * 2 if isinstance(module, nn.Linear) else y
    ),
    "an adapter": replace_linear,
    "another forward": patch_forward,
    "a parametrization": lambda model, linear: parametrize.register_parametrization(linear, "weight", Half()),
    "pruning": lambda model, linear: prune.l1_unstructured(linear, "weight", 0.5),
    "fewer layers": drop_layer,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_accelerated_model_keeps_what_is_added_to_it(original, ids, caplog, change):
    model = accelerate(copy.deepcopy(original))
    with torch.no_grad():
        before = original(ids)[0]
        handle = CHANGES[change](model, next(module for module in model.modules() if isinstance(module, nn.Linear)))
        if change != "a hook of all modules":
            CHANGES[change](original, next(module for module in original.modules() if isinstance(module, nn.Linear)))
        with caplog.at_level(logging.WARNING, "unpadded"):
            found = [model(ids)[0] for _ in range(2)]
        expected = original(ids)[0]
        if change == "a hook of all modules":
            handle.remove()
        assert all(torch.equal(one, expected) for one in found) and not torch.allclose(expected, before, atol=1e-3)
        assert [record.message.count("runs its own forward pass") for record in caplog.records] == [1]
        assert torch.equal(restore(model)(ids)[0], original(ids)[0])


def test_hooks_of_the_model_itself_run_around_the_packed_forward_pass(original, ids, caplog):
    model = accelerate(copy.deepcopy(original))
    for one in (model, original):
        one.register_forward_hook(lambda module, x, y: y[0] * 2)
    with torch.no_grad():
        assert_same(model(ids), original(ids), None)
        assert not caplog.records
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(ids), original(ids))
        assert "autocast is enabled" in caplog.text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "does not support Linear; pass a loaded transformers model"),
        (lambda: AlbertModel(AlbertConfig(vocab_size=100, embedding_size=8)), "model_type = 'albert'"),
        (lambda: BertForMaskedLM(small_bert().config), "pass its base_model, the BertModel"),
        (lambda: small_bert().double(), "torch.float64"),
        (lambda: small_bert(is_decoder=True), "is_decoder = True"),
        (lambda: small_bert().to("meta"), "meta"),
        (lambda: with_own_linear(small_bert()), "pooler.dense is a OwnLinear with a forward pass of its own"),
    ],
    ids=["not a model", "family", "head", "dtype", "decoder", "meta", "module"],
)
def test_accelerate_raises_for_unsupported_models(make, reason):
    with pytest.raises(unpadded.UnpaddedError, match=reason):
        accelerate(make())


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_own_linear(model):
    model.set_submodule("pooler.dense", OwnLinear(64, 64))
    return model


def small_bert(**changes):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(**small | {"vocab_size": 100} | changes)).eval()


@pytest.fixture
def waits(cuda, monkeypatch):
    """Return a function that calls another: its result and how often it waits for an event; other waits are errors."""
    synchronize, set_mode = torch.cuda.Event.synchronize, torch.cuda.set_sync_debug_mode

    def count(run, *args, **keywords):
        calls = []

        def counted(event):
            set_mode("default")
            calls.append(synchronize(event))
            set_mode("error")

        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda.Event, "synchronize", counted)
            set_mode("error")
            try:
                return run(*args, **keywords), len(calls)
            finally:
                set_mode("default")

    return count


@torch.no_grad()
def test_a_padded_forward_pass_waits_for_the_device_once(tmp_path, cuda, waits):
    """To read its inputs, in whatever combination, and not at all if they are on the host."""
    folder = write_bert(tmp_path, layers=1, hidden=64, heads=2, intermediate=64, tokenizer=False)
    ids, mask = torch.randint(5, 30000, (2, 4)), torch.arange(4) < torch.tensor([[4], [2]])
    given = {"input_ids": ids, "attention_mask": mask.long()}
    typed = given | {"token_type_ids": ids % 2, "position_ids": torch.arange(4)[None]}
    for model in (UnpaddedModel.from_pretrained(folder), accelerate(AutoModel.from_pretrained(folder).eval())):
        model.to(cuda)
        for arguments, states in ((given, False), (typed, True)):
            moved = {name: tensor.to(cuda) for name, tensor in arguments.items()}
            expected = model(**moved)[0]  # captures a graph
            for inputs, count in ((moved, 1), (arguments, 0)):
                found, waited = waits(model, **inputs, output_hidden_states=states)
                torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
                assert waited == count
        assert len(runner_of(model).graphs.by_key) == 2  # with token types and without


@torch.no_grad()
def test_graphs_of_an_accelerated_model_use_its_current_weights(tmp_path, cuda):
    folder = write_bert(tmp_path, layers=1, hidden=64, heads=2, intermediate=64, tokenizer=False)
    original, ids = AutoModel.from_pretrained(folder).eval(), torch.randint(5, 30000, (2, 4))
    model = accelerate(copy.deepcopy(original)).to(cuda)
    before, runner = model(ids)[0], runner_of(model)
    for one in (model, original):
        for parameter in one.parameters():
            parameter.mul_(1.1)
    assert_same(model(ids)[0].cpu(), original(ids)[0], None)
    assert len(runner.graphs.by_key) == 1 and runner_of(model) is runner
    model.load_state_dict(AutoModel.from_pretrained(folder).state_dict())
    torch.testing.assert_close(model(ids)[0], before, atol=1e-5, rtol=0)


def test_runners_have_the_index_of_the_current_device(tmp_path, cuda):
    folder = write_bert(tmp_path, layers=1, hidden=64, heads=2, intermediate=64, tokenizer=False)
    with torch.cuda.device(cuda), torch.no_grad():
        expected = torch.device("cuda", torch.cuda.current_device())
        packed, moved = UnpaddedModel.from_pretrained(folder, device="cuda"), UnpaddedModel.from_pretrained(folder)
        accelerated = accelerate(AutoModel.from_pretrained(folder).to("cuda").eval())
        assert [runner_of(model).device for model in (packed, moved.to("cuda"), accelerated)] == [expected] * 3


def runner_of(model):
    return model.engine._pipeline.runner if isinstance(model, UnpaddedModel) else vars(model)["_unpadded"].runner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [write_bert, write_nomic])
def test_models_move_to_the_gpu_and_back(tmp_path, write, dtype, cuda, seed):
    """UnpaddedModel and an accelerated model. Small, for the interpreter of the kernels."""
    names = {"names": "transformers"} if write is write_nomic else {}
    folder = write(tmp_path, layers=1, hidden=64, heads=2, intermediate=64, tokenizer=False, **names)
    original = AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(5, 30000, (3, 9))
    mask, tolerance = torch.arange(9) < torch.tensor([[9], [1], [4]]), 1e-5 if dtype == torch.float32 else 1e-2
    given = mask.long().to(cuda)
    with torch.no_grad():
        expected = original(ids, mask.long())[0]
        for model in (UnpaddedModel.from_pretrained(folder), accelerate(copy.deepcopy(original))):
            moved = model.to(cuda, dtype)(ids.to(cuda), given)[0]
            assert (moved.device.type, moved.dtype) == ("cuda", dtype)
            assert_same(moved.cpu(), expected, mask, tolerance)
            assert_same(model.to("cpu", torch.float32)(ids, mask.long())[0], expected, mask, tolerance)
