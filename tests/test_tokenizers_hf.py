"""tokenizer.json in and out: the same ids as transformers and the Rust library, foreign files included."""
from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import BOS, EOS, PAD, SPECIALS
from mindseed.tokenizers.bpe import BPE
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import load_tokenizer, save_tokenizer, tokenizer_json
from mindseed.tokenizers.split import QWEN

CORPUS = ["the seed grows and the trees grow", "种子发芽，模型生长。", "it's 2026 + 1 = 2027!\n\n  indented",
          "🙂 e\u0301 aaaa"] * 9
bounded = settings(max_examples=50, deadline=None)
plain = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(CORPUS),
                  st.binary().map(lambda b: b.decode("latin-1")), st.text("ab 1\n\r\t'sS.,e\u0301", max_size=30))
marked = st.lists(st.one_of(plain, st.sampled_from(SPECIALS)), max_size=6).map("".join)


@pytest.fixture(scope="module", params=["bpe", "byte"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train(CORPUS, vocab_size=350) if request.param == "bpe" else Byte()
    save_tokenizer(tokenizer, folder, chat_template="{{ messages[0].content }}", max_len=77)
    return folder, tokenizer


def test_what_was_saved_loads_as_the_same_tokenizer(saved):
    folder, tokenizer = saved
    for path in (folder, folder / "tokenizer.json"):
        again = load_tokenizer(path)
        assert type(again) is type(tokenizer) and again.hash() == tokenizer.hash()
        assert (again.specials, again.visible) == (tokenizer.specials, tokenizer.visible)


@pytest.mark.parity
@bounded
@given(text=marked)
def test_the_rust_library_reads_our_file_to_the_same_ids(saved, text):
    folder, tokenizer = saved
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = rust.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, allow_special=True) == ids
    assert rust.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    assert rust.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special=True)


@pytest.mark.parity
@pytest.mark.parametrize("with_model_config", [False, True])      # a Qwen3 config.json beside it changes AutoTokenizer
def test_autotokenizer_gives_the_same_ids(saved, with_model_config):
    transformers = pytest.importorskip("transformers")
    folder, tokenizer = saved
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    if with_model_config:
        config.write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*CORPUS[:4], "<|im_start|>user\n<think> hi</think><|im_end|>\n", "e\u0301 \u212b １２ \x00\x1f",
                 "".join(SPECIALS)]:
        assert auto(text)["input_ids"] == tokenizer.encode(text, allow_special=True)
        ids = tokenizer.encode(text)
        assert auto.decode(ids) == tokenizer.decode(ids) == text
    assert (auto.pad_token, auto.bos_token, auto.eos_token) == (PAD, BOS, EOS)
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 1, 2)
    assert auto.model_max_length == 77 and len(auto) == tokenizer.vocab_size


# ----------------------------------------------------------------------------------------------------- foreign files

def foreign(kind: str) -> Tokenizer:
    """Tokenizers made with the Rust library in the manner of well-known ones."""
    rust = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    rust.pre_tokenizer = {
        "minimind": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                           pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    }.get(kind, pre_tokenizers.Sequence([split, byte_level]))
    rust.decoder = decoders.ByteLevel()
    if kind == "qwen3":
        rust.normalizer = normalizers.NFC()
    first = SPECIALS[:3] if kind in ("minimind", "smollm") else []
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(first), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    rust.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS[:3]])
    rust.add_tokens([AddedToken(s, special=False, normalized=False) for s in SPECIALS[3:9]])
    if kind == "llama3":
        rust.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, rust.token_to_id(BOS))])
    return rust


@pytest.fixture(scope="module", params=["qwen3", "minimind", "smollm", "llama3", "qwen3, merges as strings"])
def pair(request, tmp_path_factory):
    rust = foreign(request.param.split(",")[0])
    data = json.loads(rust.to_str())
    if "strings" in request.param:
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    path.write_text(json.dumps(data))
    return rust, load_tokenizer(path)


@pytest.mark.parity
@bounded
@given(text=marked)
def test_foreign_files_give_the_ids_of_the_rust_library(pair, text):
    rust, ours = pair
    ids = rust.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allow_special=True) == ids
    assert ours.vocab_size == rust.get_vocab_size()
    assert rust.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)


@bounded
@given(text=marked)
def test_foreign_files_too_never_make_special_tokens_of_text(pair, text):
    ours = pair[1]
    ids = ours.encode(text)
    assert not set(ids) & set(ours.specials.values())
    assert ours.encode_batch([text]) == [ids]


def test_a_foreign_tokenizer_survives_saving(pair, tmp_path):
    save_tokenizer(pair[1], tmp_path)
    assert load_tokenizer(tmp_path).hash() == pair[1].hash()


def edited(change) -> dict:
    data = copy.deepcopy(tokenizer_json(BPE.from_merges([])))
    change(data)
    return data


@pytest.mark.parametrize("change, message", [
    (lambda d: d["model"].update(type="Unigram"), "the model is Unigram"),
    (lambda d: d["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda d: d["model"].update(dropout=0.1), "dropout"),
    (lambda d: d["model"]["vocab"].pop("a"), "lacks 1 of the 256 bytes \\(61"),
    (lambda d: d["model"]["vocab"].update({"▁the": 999}), "byte-level"),
    (lambda d: d["model"]["merges"].append("q zz"), "merge 0, 'q zz', is not a pair"),
    (lambda d: d["model"]["merges"].append(["q", "z"]), "merge 0 joins"),
    (lambda d: d["model"]["merges"].append(["<think>", "z"]), "merge 0 uses a special token"),
    (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    (lambda d: d.update(pre_tokenizer={"type": "Metaspace"}), "ends in Metaspace"),
    (lambda d: d.update(pre_tokenizer=None), "ends in none"),
    (lambda d: d.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space=false"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}), "step Whitespace"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "step Split"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}), "cannot be built"),
    (lambda d: d["added_tokens"][0].update(lstrip=True), "matches more than its spelling"),
    (lambda d: d["added_tokens"][0].update(content="  ", special=False), "white space"),
    (lambda d: d.pop("model"), "not a tokenizer.json"),
])
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(edited(change)))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_a_missing_or_broken_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(tmp_path)
