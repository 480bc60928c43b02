"""`mindseed tokenizer`: from files to a folder, sampled within a limit, bad rows named, compression told apart."""
from __future__ import annotations

import json
import random

import pytest

from mindseed.base.errors import UserError
from mindseed.recipes.tokenizer import Options, draw, language_of, main
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import JINJA
from mindseed.tokenizers.hf_json import load_tokenizer


@pytest.fixture
def data(tmp_path):
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(["the seed", "grows", "a tree", "it is"], k=9))} for _ in range(150)]
    words = ["种子", "发芽", "大树", "生长"]
    rows += [{"conversations": [{"role": "user", "content": "".join(rng.choices(words, k=9))},
                                {"role": "assistant", "content": "好的。"}]} for _ in range(150)]
    lines = [json.dumps(row) for row in rows]
    lines[7:7] = ["{broken", '{"text": "\\ud800"}']
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_the_folder_holds_a_tokenizer_with_the_chat_template(data, tmp_path, capsys):
    main(Options(data=(data,), out=str(tmp_path / "out"), vocab_size=310, workers=1))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 310
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == JINJA
    said = capsys.readouterr()
    assert "Chinese" in said.out and "English" in said.out and "bytes per token" in said.out
    assert "data.jsonl:8: corrupt JSON" in said.err and "data.jsonl:9: " in said.err


def test_a_byte_tokenizer_needs_no_training_and_a_small_corpus_warns(data, tmp_path, capsys):
    main(Options(data=(data,), out=str(tmp_path / "byte"), kind="byte"))
    assert isinstance(load_tokenizer(tmp_path / "byte"), Byte)
    main(Options(data=(data,), out=str(tmp_path / "bpe"), workers=2))
    assert "too few repetitions" in capsys.readouterr().err


def test_the_sample_is_uniform_bounded_and_a_function_of_the_seed():
    texts = [f"{i:04}" for i in range(2000)]
    quiet = lambda *_: None
    learn, measure = draw(texts, 4 * 500, 1, quiet)
    sample = sorted(learn + measure)
    assert len(sample) == 500 and learn == sorted(learn)
    assert 150 < sum(text < "1000" for text in sample) < 350              # not just the beginning
    assert draw(texts, 4 * 500, 1, quiet) == (learn, measure) != draw(texts, 4 * 500, 2, quiet)
    assert len(set(learn) | set(measure)) == 500
    assert sum(map(len, draw(["long" * 99], 10, 0, quiet))) == 1          # one text is never too long


@pytest.mark.parametrize("text, language", [
    ("种子发芽了", "Chinese"), ("a seed grows", "English"), ("翻译：a seed", "English"), ("1 + 2 = 3", "other"),
    ("《种子》is a book 关于植物", "Chinese"), ("семя растёт", "other")])
def test_languages_are_told_apart_by_their_letters(text, language):
    assert language_of(text) == language


def test_mistakes_are_user_errors(data, tmp_path):
    with pytest.raises(UserError, match="name the text and a folder"):
        main(Options(data=(data,)))
    with pytest.raises(UserError, match="is a file"):
        main(Options(data=(data,), out=data))
    with pytest.raises(UserError, match="too small"):
        main(Options(data=(data,), out=str(tmp_path / "out"), vocab_size=100, workers=1))
    with pytest.raises(ValueError, match="workers=0"):
        Options(workers=0)
