"""UnpaddedModel, accelerate and the attention interface against transformers' own models, fp32, on values."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import MINILM, write_bert, write_nomic
from support.family_checks import of_transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    NomicBertModel,
    pipeline,
)

import unpadded
from unpadded.integrations.accelerate import accelerate, restore
from unpadded.integrations.attention_interface import attend
from unpadded.integrations.transformers import UnpaddedModel

LENGTHS = torch.tensor([[20], [1], [7], [3]])
COLUMNS = torch.arange(20)
MASKS = {
    "none": None,
    "right": COLUMNS < LENGTHS,
    "left": COLUMNS >= 20 - LENGTHS,
    "holes": (COLUMNS + LENGTHS) % 3 > 0,
    "a row of padding": (COLUMNS < LENGTHS) & (LENGTHS > 1),
}
SENTENCES = ["search_query: What is TSNE?", "search_query: Who is Laurens van der Maaten?", "search_query: Hm " * 40]


@pytest.fixture(scope="module", params=["nomic_bert", "bert"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_bert(folder) if request.param == "bert" else write_nomic(folder, names="transformers")


@pytest.fixture
def theirs(folder):
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture
def ids(seed):
    return torch.randint(5, 30000, (4, 20))


def assert_same(ours, expected, mask, tolerance=1e-5):
    """Relative Frobenius error over the tokens that the mask keeps; zeros elsewhere."""
    kept = torch.ones(ours.shape[:2], dtype=torch.bool) if mask is None else mask
    error = (ours[kept].double() - expected[kept].double()).norm() / expected[kept].double().norm()
    assert error <= tolerance
    assert not ours[~kept].any()


@pytest.mark.parametrize("padding", MASKS)
def test_hidden_states_match_transformers(folder, theirs, ids, padding):
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    ours = UnpaddedModel.from_pretrained(folder)(ids, given, output_hidden_states=True)
    with torch.no_grad():
        expected = theirs(ids, given, output_hidden_states=True)
    assert_same(ours.last_hidden_state, expected.last_hidden_state, mask)
    assert len(ours.hidden_states) == len(expected.hidden_states)
    for state, expected_state in zip(ours.hidden_states, expected.hidden_states, strict=True):
        assert_same(state, expected_state, mask)


def test_position_ids(folder, theirs, ids):
    """A row for all, and each text's own."""
    mask = MASKS["right"]
    model, accelerated = UnpaddedModel.from_pretrained(folder), accelerate(copy.deepcopy(theirs))
    for positions in (COLUMNS[None], 19 - COLUMNS[None], (COLUMNS + 3 * LENGTHS).flip(1)):
        with torch.no_grad():
            # NomicBert's rotary embedding takes no single row for several texts
            expected = theirs(ids, mask.long(), position_ids=positions.expand(4, -1))[0]
            for ours in (model, accelerated):
                assert_same(ours(ids, mask.long(), position_ids=positions)[0], expected, mask)


def mean_pooling(model_output, attention_mask):
    """As published on the model card."""
    token_embeddings = model_output[0]
    expanded = attention_mask.unsqueeze(-1).expand(token_embeddings.size()).float()
    return torch.sum(token_embeddings * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)


def card_example(model, tokenizer, sentences):
    encoded = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        model_output = model(**encoded)
    return F.normalize(mean_pooling(model_output, encoded["attention_mask"]), p=2, dim=1)


def test_the_card_example_runs(folder, theirs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = card_example(UnpaddedModel.from_pretrained(folder, trust_remote_code=True), tokenizer, SENTENCES)
    torch.testing.assert_close(ours, card_example(theirs, tokenizer, SENTENCES), atol=1e-6, rtol=0)


def test_the_card_example_past_the_trained_length(tmp_path):
    """rotary_scaling_factor=2 and model_max_length=8192: each text as transformers scales it alone."""
    scaled = write_nomic(tmp_path / "scaled", names="transformers", trained_length=64, scaling_factor=2.0)
    plain = write_nomic(tmp_path / "plain", trained_length=64)
    tokenizer = AutoTokenizer.from_pretrained(plain, model_max_length=8192)
    model = UnpaddedModel.from_pretrained(plain, trust_remote_code=True, rotary_scaling_factor=2)
    ours = card_example(model, tokenizer, SENTENCES)
    for text, row in zip(SENTENCES, ours, strict=True):
        fresh = NomicBertModel.from_pretrained(scaled).eval()
        torch.testing.assert_close(row, card_example(fresh, tokenizer, [text])[0], atol=1e-6, rtol=0)
    unscaled = card_example(UnpaddedModel.from_pretrained(plain), tokenizer, SENTENCES)
    assert [torch.equal(*rows) for rows in zip(ours, unscaled, strict=True)] == [True, True, False]


def test_the_feature_extraction_pipeline_takes_it():
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    ours = pipeline(
        "feature-extraction", device="cpu", model=UnpaddedModel.from_pretrained(MINILM), tokenizer=tokenizer
    )
    theirs = pipeline("feature-extraction", device="cpu", model=AutoModel.from_pretrained(MINILM), tokenizer=tokenizer)
    torch.testing.assert_close(ours("Some text."), theirs("Some text."), atol=1e-5, rtol=0)
    batch = zip(ours(SENTENCES, batch_size=2), theirs(SENTENCES, batch_size=2), strict=True)
    for row, expected in batch:
        expected = torch.tensor(expected)
        kept = torch.tensor(row).abs().sum(-1) > 0
        torch.testing.assert_close(torch.tensor(row)[kept], expected[kept], atol=1e-5, rtol=0)


def test_it_is_a_module(folder, ids):
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


def test_it_follows_a_state_that_it_is_given(folder, ids):
    model, other = UnpaddedModel.from_pretrained(folder), UnpaddedModel.from_pretrained(folder)
    state = {name: parameter * 1.1 for name, parameter in other.state_dict().items()}
    other.load_state_dict(state)
    assert not torch.equal(other(ids)[0], model(ids)[0])
    nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{name}": value for name, value in state.items()})
    assert torch.equal(other(ids)[0], model(ids)[0])
    assert torch.equal(other.bfloat16().float()(ids)[0], copy.deepcopy(other)(ids)[0])


def test_the_stored_dtype_is_the_default(tmp_path):
    assert UnpaddedModel.from_pretrained(write_nomic(tmp_path, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_saved_and_loaded_by_transformers(folder, theirs, ids, tmp_path):
    UnpaddedModel.from_pretrained(folder).save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(ids)[0], theirs(ids)[0])


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
def test_what_is_not_offered_is_refused(folder, ids, arguments, reason):
    model = UnpaddedModel.from_pretrained(folder)
    with pytest.raises(unpadded.UnpaddedError, match=reason):
        model(ids, **arguments)


def test_inputs_embeds_of_another_shape_are_refused(folder):
    model = UnpaddedModel.from_pretrained(folder)
    for embeds in (torch.zeros(4, 20, 127), torch.zeros(20, 128), torch.zeros(4, 20, 128, dtype=torch.long)):
        with pytest.raises(unpadded.InputError, match=r"\[batch, length, 128\]"):
            model(inputs_embeds=embeds)
    with pytest.raises(unpadded.InputError, match="neither input_ids nor inputs_embeds"):
        model(attention_mask=torch.ones(4, 20))


def test_ids_out_of_range_are_refused(folder, ids):
    model = UnpaddedModel.from_pretrained(folder)
    with pytest.raises(unpadded.InputError, match="input_ids contain 99999"):
        model(ids.index_fill(1, torch.tensor([3]), 99999))
    with pytest.raises(unpadded.InputError, match="input_ids contain -1"):
        model(ids.index_fill(1, torch.tensor([3]), -1))
    with pytest.raises(unpadded.InputError, match="integers"):
        model(ids.float())


def test_positions_beyond_the_table_are_refused(tmp_path):
    model = UnpaddedModel.from_pretrained(write_bert(tmp_path, positions=16))
    with pytest.raises(unpadded.InputError, match=r"position 19.* 16 .*truncation=True"):
        model(torch.full((1, 20), 7))


def test_training_mode_and_unknown_arguments_are_refused(folder, ids):
    with pytest.raises(unpadded.OptionError, match="training mode"):
        UnpaddedModel.from_pretrained(folder).train()(ids)
    with pytest.raises(unpadded.OptionError, match="quantization_config"):
        UnpaddedModel.from_pretrained(folder, quantization_config={})


def test_nothing_but_padding(folder):
    """A row, or a whole batch, without a token."""
    output = UnpaddedModel.from_pretrained(folder)(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5))
    assert output[0].shape[:2] == (2, 5) and not output[0].any()


def memory(model):
    """Bytes of the distinct storages under a model's parameters."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def seeded(family):
    """A small transformers model of a family, fp32, with weights large enough to matter beside the residuals."""
    torch.manual_seed(0)
    types = {"type_vocab_size": 3}
    name, own = {
        "bert": ("Bert", types),
        "eurobert": ("EuroBert", {"num_key_value_heads": 2}),
        "gte": ("Gte", types),
        "gte without types": ("Gte", {"type_vocab_size": 0}),
        "jina_v3": ("JinaEmbeddingsV3", types),
        "modernbert": ("ModernBert", {"local_attention": 8}),
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
def test_accelerated_matches(folder, theirs, ids, padding):
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    model = accelerate(copy.deepcopy(theirs))
    assert memory(model) == memory(theirs)
    with torch.no_grad():
        ours, expected = model(ids, given, output_hidden_states=True), theirs(ids, given, output_hidden_states=True)
        assert_same(ours[0], expected[0], mask)
        assert_same(ours.hidden_states[1], expected.hidden_states[1], mask)
        if theirs.config.model_type == "bert" and padding != "left":  # transformers pools a padding token there
            torch.testing.assert_close(ours.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
        assert torch.equal(model(ids, given, return_dict=False)[0], ours[0])


@pytest.mark.parametrize("family", ["gte", "modernbert", "xlm_roberta"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_other_families_match(ids, family, padding, tmp_path):
    theirs = seeded(family)
    ids = ids if MASKS[padding] is None else ids.where(MASKS[padding], theirs.config.pad_token_id)
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    theirs.save_pretrained(tmp_path)
    ours = UnpaddedModel.from_pretrained(tmp_path)
    accelerated = accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        expected = theirs(ids, given, output_hidden_states=True)
        for model in (ours, accelerated):
            output = model(ids, given, output_hidden_states=True)
            assert_same(output[0], expected[0], mask)
            for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_same(state, expected_state, mask)


@pytest.fixture(
    scope="module",
    params=["bert", "eurobert", "gte", "gte without types", "jina_v3", "modernbert", "nomic_bert", "xlm_roberta"],
)
def trio(request, tmp_path_factory):
    """A transformers model of a family, its checkpoint as an UnpaddedModel, and a copy of it accelerated."""
    folder, theirs = tmp_path_factory.mktemp("checkpoint"), seeded(request.param)
    theirs.save_pretrained(folder)
    return theirs, UnpaddedModel.from_pretrained(folder), accelerate(copy.deepcopy(theirs))


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("types", [False, True], ids=["", "types"])
@pytest.mark.parametrize("words", ["input_ids", "inputs_embeds"])
def test_token_types_and_inputs_embeds(trio, ids, words, types, padding, caplog):
    """What a model does with both, ignoring types of which it has none, in every hidden state."""
    theirs, *ours = trio
    mask = MASKS[padding]
    if padding == "holes" and theirs.config.model_type == "modernbert":
        pytest.skip("refused")
    given = {"attention_mask": None if mask is None else mask.long(), "output_hidden_states": True}
    given[words] = ids if words == "input_ids" else 0.15 * torch.randn(4, 20, 64)
    if types:
        given["token_type_ids"] = torch.randint(3, (4, 20))
    with torch.no_grad():
        expected = theirs(**given)
        for model in ours:
            output = model(**given)
            assert_same(output[0], expected[0], mask)
            for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_same(state, expected_state, mask)
    assert not caplog.records


def test_the_tables_own_rows_as_inputs_embeds(trio, ids):
    """The bits of the ids that stand for them: from another dtype, strided, with a gradient, which is not carried."""
    theirs, *ours = trio
    mask = MASKS["left"]
    embeds = theirs.get_input_embeddings()(ids)
    assert embeds.requires_grad
    strided = embeds.detach().repeat_interleave(2, dim=2)[..., ::2]
    for model in ours:
        expected = model(ids, mask)[0]
        if theirs.config.model_type == "xlm_roberta":  # whose embeddings have other positions than its ids
            expected = model(ids, mask, position_ids=COLUMNS[None] + 2)[0]
        for given in (embeds, embeds.double(), strided):
            found = model(inputs_embeds=given, attention_mask=mask)[0]
            assert torch.equal(found, expected) and not found.requires_grad


def test_inputs_embeds_with_their_positions_and_one_row_of_types(trio):
    theirs, *ours = trio
    given = {"inputs_embeds": torch.randn(4, 20, 64), "attention_mask": MASKS["right"].long()}
    given["token_type_ids"] = torch.randint(3, (1, 20))
    with torch.no_grad():
        for positions in (19 - COLUMNS[None], (COLUMNS + 3 * LENGTHS).flip(1)):
            given["position_ids"] = positions
            # NomicBert's rotary embedding takes no single row for several texts
            expected = theirs(**given | {"position_ids": positions.expand(4, -1)})[0]
            for model in ours:
                assert_same(model(**given)[0], expected, MASKS["right"])


@pytest.mark.gpu
def test_token_types_and_inputs_embeds_on_the_gpu(trio, ids):
    """From either device."""
    theirs, *ours = trio
    mask = MASKS["right"]
    for words in ({"input_ids": ids}, {"inputs_embeds": 0.15 * torch.randn(4, 20, 64)}):
        given = {"attention_mask": mask.long(), "token_type_ids": torch.randint(3, (4, 20)), **words}
        with torch.no_grad():
            expected = theirs(**given)[0]
            for model in ours:
                moved = copy.deepcopy(model).to("cuda")
                for device in ("cpu", "cuda"):
                    found = moved(**{name: tensor.to(device) for name, tensor in given.items()})[0]
                    assert_same(found.cpu(), expected, mask)


def test_restored_is_as_before(theirs, ids):
    model = accelerate(copy.deepcopy(theirs))
    assert restore(model) is model
    assert vars(model).keys() == vars(theirs).keys()
    with torch.no_grad():
        assert torch.equal(model(ids)[0], theirs(ids)[0])
    pointers = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    with pytest.raises(unpadded.OptionError, match="is not accelerated"):
        restore(model)


def test_accelerated_follows_its_weights(theirs, ids):
    """After an in-place change, a cast, a copy and a load of a state dict."""
    model = accelerate(copy.deepcopy(theirs))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids)[0]
        for parameter in (*copied.parameters(), *theirs.parameters()):
            parameter.mul_(1.1)
        assert torch.equal(model(ids)[0], before)
        assert_same(copied(ids)[0], theirs(ids)[0], None)
        model.load_state_dict(copied.state_dict())
        assert torch.equal(model(ids)[0], copied(ids)[0])
        assert_same(model.double().float()(ids)[0], theirs(ids)[0], None)
        assert model.bfloat16()(ids)[0].dtype == torch.bfloat16


def test_accelerated_saves(theirs, ids, tmp_path):
    accelerate(copy.deepcopy(theirs)).save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(theirs).from_pretrained(tmp_path).eval()(ids)[0], theirs(ids)[0])


def test_accelerated_falls_back_and_says_so_once(theirs, ids, caplog):
    model = accelerate(copy.deepcopy(theirs))
    theirs.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    embeds = theirs.get_input_embeddings()(ids).detach()
    given = {"token_type_ids": torch.ones_like(ids), "output_attentions": True}
    with caplog.at_level(logging.WARNING, "unpadded"), torch.no_grad():
        assert torch.equal(model(ids, **given)[0], theirs(ids, **given)[0])
        assert torch.equal(model(inputs_embeds=embeds, **given)[0], theirs(inputs_embeds=embeds, **given)[0])
        assert len(model(ids, **given).attentions) == 2
    assert len(caplog.records) == 1 and "output_attentions" in caplog.text
    assert model.train()(ids)[0].requires_grad
    assert not model.eval()(ids)[0].requires_grad
    assert "training mode" in caplog.text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "does not support Linear; pass a loaded transformers model"),
        (lambda: DistilBertModel(DistilBertConfig(n_layers=1, vocab_size=100)), "model_type = 'distilbert'"),
        (lambda: BertForMaskedLM(small_bert().config), "pass its base_model, the BertModel"),
        (lambda: small_bert().double(), "torch.float64"),
        (lambda: small_bert(is_decoder=True), "is_decoder = True"),
        (lambda: small_bert().to("meta"), "meta"),
    ],
    ids=["not a model", "family", "head", "dtype", "decoder", "meta"],
)
def test_what_cannot_be_accelerated_is_refused(make, reason):
    with pytest.raises(unpadded.UnpaddedError, match=reason):
        accelerate(make())


def small_bert(**changes):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(**small | {"vocab_size": 100} | changes)).eval()


@pytest.mark.parametrize("padding", MASKS)
def test_the_attention_interface(folder, theirs, ids, padding):
    mask = MASKS[padding]
    given = None if mask is None else mask.long()
    ours = type(theirs).from_pretrained(folder, attn_implementation="unpadded").eval()
    with torch.no_grad():
        hidden, expected = ours(ids, given)[0], theirs(ids, given)[0]
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    assert (hidden[kept] - expected[kept]).norm() / expected[kept].norm() <= 1e-5


class CountCalls(TorchDispatchMode):
    """Counts the calls of one operation of torch."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.calls = operation, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls += operation is self.operation
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_attention_interface_reads_the_mask_once_per_forward_pass(ids, padding):
    """The texts' boundaries, a cumulative sum, are computed once for all layers."""
    model = small_bert(num_hidden_layers=3, vocab_size=30000)
    model.set_attn_implementation("unpadded")
    with torch.no_grad(), CountCalls(torch.ops.aten.cumsum.default) as boundaries:
        model(ids, MASKS[padding])
    assert boundaries.calls == 1


def test_the_attention_interface_reads_a_mask_changed_in_place(ids):
    model, expected = small_bert(vocab_size=30000), small_bert(vocab_size=30000)
    expected.load_state_dict(model.state_dict())
    model.set_attn_implementation("unpadded")
    mask = MASKS["right"].clone()
    with torch.no_grad():
        model(ids, mask)
        mask[0, 10:] = False
        torch.testing.assert_close(model(ids, mask)[0][mask], expected(ids, mask)[0][mask], atol=1e-5, rtol=0)


def test_the_attention_interface_refuses(theirs):
    q = torch.randn(1, 4, 6, 8)
    for arguments, reason in [
        ((q, q, q, None, None, 0.1), "dropout = 0.1"),
        ((q, q[:, :2], q[:, :2], None), "grouped-query"),
        ((q, q, q, torch.zeros(1, 1, 6, 6)), "attention_mask has 4 dimensions"),
    ]:
        with pytest.raises(unpadded.OptionError, match=reason):
            attend(theirs, *arguments)
    with pytest.raises(unpadded.OptionError, match="is_causal = True"):
        attend(theirs, q, q, q, None, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moved_to_the_gpu_and_back(folder, theirs, ids, dtype, cuda):
    """UnpaddedModel, an accelerated model and the attention interface, by `to`."""
    mask, tolerance = MASKS["right"], 1e-5 if dtype == torch.float32 else 1e-2
    given = mask.long().to(cuda)
    with torch.no_grad():
        expected = theirs(ids, mask.long())[0]
        alone = type(theirs).from_pretrained(folder, attn_implementation="unpadded").eval().to(cuda, dtype)
        kept = (alone(ids.to(cuda), given)[0].cpu().double() - expected)[mask].norm() / expected[mask].norm()
        assert kept <= tolerance
        for model in (UnpaddedModel.from_pretrained(folder), accelerate(copy.deepcopy(theirs))):
            moved = model.to(cuda, dtype)(ids.to(cuda), given)[0]
            assert (moved.device.type, moved.dtype) == ("cuda", dtype)
            assert_same(moved.cpu(), expected, mask, tolerance)
            assert_same(model.to("cpu", torch.float32)(ids, mask.long())[0], expected, mask, tolerance)
