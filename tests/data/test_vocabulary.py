"""Laws of every vocabulary."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data import (
    ByteVocabulary,
    SubwordVocabulary,
    Vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from sparsegate.data.files import sealed
from sparsegate.data.joint_subwords import JointSubwords
from sparsegate.data.normalization import PLAIN, TOKENIZED, normalize
from sparsegate.data.vocabulary import token_dtype
from tests.data.making import CURIOUS, lines, train_vocabulary

TRAINING = [
    [
        "def f(x):",
        "\treturn x + 1  # plus one",
        "        return x",
        "the cat sat on the mat",
        "the cat's </s>",
    ],
    ["", CURIOUS, "naïve café naïve", "<unk> the end"],
]
LOSSLESS = [
    ByteVocabulary(normalization=PLAIN),
    SubwordVocabulary.train(TRAINING, size=300, normalization=PLAIN),
]
LOSSY = [
    train_vocabulary("words", TRAINING, size=None, normalization=PLAIN),
    train_vocabulary("words", TRAINING, size=8, normalization=TOKENIZED),
    train_vocabulary("characters", TRAINING, size=20, normalization=PLAIN),
]
ALL = [*LOSSLESS, *LOSSY, JointSubwords.train(TRAINING, size=300, languages=["de", "en"])]
every_vocabulary = pytest.mark.parametrize("vocabulary", ALL, ids=lambda v: f"{v.kind}-{v.size}")
every_lossless = pytest.mark.parametrize("vocabulary", LOSSLESS, ids=lambda v: v.kind)


@every_lossless
@given(line=lines)
def test_decoding_gives_back_every_line_in_nfc(vocabulary: Vocabulary, line: str) -> None:
    assert vocabulary.unknown_id is None
    assert vocabulary.decode(vocabulary.encode(line)) == normalize(line)


@every_lossless
@given(several=st.lists(lines, min_size=1, max_size=4))
def test_decoding_gives_back_text_of_several_lines(vocabulary: Vocabulary, several: list[str]) -> None:
    text = "\n".join(several)
    assert vocabulary.decode(vocabulary.encode_text(text)) == normalize(text)


@given(line=lines)
def test_characters_come_back_where_all_are_known(line: str) -> None:
    vocabulary = train_vocabulary("characters", [[line]], size=None, normalization=PLAIN)
    assert vocabulary.decode(vocabulary.encode(line)) == normalize(line)
    assert vocabulary.unknown_id not in vocabulary.encode(line)


@every_vocabulary
@given(several=st.lists(st.one_of(lines, st.sampled_from(["</s>", "a </s> b", "<unk>", ""])), max_size=4))
def test_lines_are_their_ids_and_an_end_that_no_text_encodes_to(
    vocabulary: Vocabulary, several: list[str]
) -> None:
    alone = [vocabulary.encode(line) for line in several]
    assert vocabulary.encode_lines(several).tolist() == [
        token for ids in alone for token in (*ids, vocabulary.end_id)
    ]
    for token in (token for ids in alone for token in ids):
        assert 0 <= token < vocabulary.size
        assert token != vocabulary.end_id


@given(line=lines)
def test_tokenized_words_that_were_decoded_encode_to_themselves(line: str) -> None:
    vocabulary = LOSSY[1]
    ids = vocabulary.encode(line)
    assert vocabulary.encode(vocabulary.decode(ids)) == ids


@every_vocabulary
def test_encode_takes_one_line(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="use encode_text"):
        vocabulary.encode("two\nlines")


@every_vocabulary
def test_ids_outside_are_refused(vocabulary: Vocabulary) -> None:
    for token in (-1, vocabulary.size):
        with pytest.raises(
            ValueError, match=f"token id {token} is outside the vocabulary of {vocabulary.size}"
        ):
            vocabulary.decode([token])


@every_vocabulary
def test_a_saved_vocabulary_is_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    save_vocabulary(vocabulary, path)
    loaded = load_vocabulary(path)
    assert type(loaded) is type(vocabulary)
    assert loaded.to_json() == vocabulary.to_json()
    assert loaded.fingerprint == vocabulary.fingerprint
    for several in TRAINING:
        assert np.array_equal(loaded.encode_lines(several), vocabulary.encode_lines(several))
    assert list(tmp_path.iterdir()) == [path]


@every_vocabulary
def test_a_fingerprint_tells_what_ids_mean_and_nothing_else(vocabulary: Vocabulary) -> None:
    assert vocabulary.with_normalization(TOKENIZED).fingerprint == vocabulary.fingerprint
    assert [other.fingerprint for other in ALL].count(vocabulary.fingerprint) == 1


@every_vocabulary
@pytest.mark.parametrize("line", ["\ud800", "é a\udfffb"])
def test_lone_surrogates_are_refused(vocabulary: Vocabulary, line: str) -> None:
    with pytest.raises(
        ValueError, match=r"a lone surrogate, U\+D(800|FFF), at character [14]; read it as UTF-8"
    ):
        vocabulary.encode(line)


HEAD = {"format": 1, "normalization": "plain-1"}
WORDS = {**HEAD, "kind": "words", "words": ["</s>", "<unk>", "a"], "counts": [1, 2, 3]}
CHARACTERS = {**HEAD, "kind": "characters", "characters": ["</s>", "<unk>", "a"], "counts": [1, 1, 1]}
SUBWORDS = {**HEAD, "kind": "subwords", "merges": [["a", "b"]]}
JOINT = {**SUBWORDS, "kind": "joint_subwords", "languages": ["de", "en"]}


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        ({**WORDS, "format": 2}, "format: Input should be 1"),
        ({**WORDS, "kind": "phrases"}, "Input tag 'phrases' found using 'kind' does not match"),
        ({**WORDS, "normalization": "plain-0"}, "normalization 'plain-0' is unknown"),
        ({**WORDS, "words": ["<unk>", "</s>", "a"]}, "words: must begin with </s> and <unk>"),
        ({**WORDS, "words": ["</s>", "<unk>", "<unk>"]}, "words: '<unk>' stands in it 2 times"),
        ({**WORDS, "words": ["</s>", "<unk>", "a b"]}, "words: 'a b' is not one word"),
        ({**WORDS, "words": ["</s>", "<unk>", ""]}, "words: '' is not one word"),
        ({**WORDS, "words": ["</s>", "<unk>", "\n"]}, r"words: '\\n' is not one word"),
        ({**WORDS, "words": ["</s>", "<unk>", "a" * 129]}, "is not one word of at most 128"),
        ({**WORDS, "words": ["</s>", "<unk>", 3]}, "words.2: Input should be a valid string"),
        ({**WORDS, "counts": [1, 2]}, "counts: 2 for 3 words"),
        ({**WORDS, "counts": [1, 2, -3]}, "counts.2: Input should be greater than or equal to 0"),
        ({**WORDS, "counts": [1, 2, True]}, "counts.2: Input should be a valid integer"),
        ({**WORDS, "counts": [1, 2, 1.5]}, "counts.2: Input should be a valid integer"),
        ({**WORDS, "extra": 1}, "extra: Extra inputs are not permitted"),
        ({**HEAD, "kind": "words"}, "words: Field required"),
        ({**CHARACTERS, "characters": ["</s>", "<unk>", "ab"]}, "characters: 'ab' is not one character"),
        ({**SUBWORDS, "merges": [["ab", "c"]]}, r"merges: 'ab' \+ 'c' joins a piece that no earlier"),
        ({**SUBWORDS, "merges": [["a", "b"], ["a", "b"]]}, "merges: the same merge stands in it twice"),
        ({**SUBWORDS, "merges": [["a"]]}, "merges.0: List should have at least 2 items"),
        ({**JOINT, "merges": [["ab", "c"]]}, r"merges: 'ab' \+ 'c' joins a piece that no earlier"),
        ({**JOINT, "languages": []}, r"languages \(\) must be in order, and each one once"),
        ({**JOINT, "languages": ["en", "de"]}, r"languages \(en, de\) must be in order"),
        ({**JOINT, "languages": ["en", "en"]}, r"languages \(en, en\) must be in order, and each one once"),
        ({**JOINT, "languages": ["../en"]}, "language '../en' must be a code such as de"),
    ],
)
def test_a_well_sealed_vocabulary_that_makes_no_sense_is_refused(
    payload: dict[str, object], cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(sealed(payload))
    with pytest.raises(ValueError, match=cause) as refusal:
        load_vocabulary(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_json_that_is_too_large_or_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match=r"68,157,440 bytes, more than max_bytes \(67,108,864\)"):
        load_vocabulary(path)
    path.write_bytes(sealed({"words": "DEEP"}).replace(b'"DEEP"', b"[" * 100_000))
    with pytest.raises(ValueError, match="damaged"):
        load_vocabulary(path)


def test_deep_json_with_a_fitting_seal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vocabulary.json"
    monkeypatch.setattr(
        "sparsegate.data.files._json", lambda value, line_end: '{"words": ' + "[" * 100_000 + "\n}"
    )
    path.write_bytes(sealed({"any": "thing"}))
    with pytest.raises(ValueError, match="Invalid JSON: recursion limit exceeded"):
        load_vocabulary(path)


@pytest.mark.parametrize(("size", "bytes_each"), [(256, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_tokens_are_stored_in_the_smallest_type_that_holds_them(size: int, bytes_each: int) -> None:
    assert token_dtype(size).itemsize == bytes_each
    assert np.iinfo(token_dtype(size)).max >= size - 1
