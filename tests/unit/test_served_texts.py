"""A server reads texts: each against tokens or votes counted by hand."""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from espalier.data.tokens import Encoder, joined, padded
from espalier.errors import ConfigError
from espalier.export import onnx
from espalier.models.text_cnn import TextCNN
from espalier.models.transformer import Transformer
from espalier.serving import inputs, occlusion
from espalier.serving.batcher import Batcher
from espalier.serving.errors import RequestError
from espalier.serving.predictor import Predictor
from espalier.serving.texts import Texts
from espalier.spec import Cut, DataSpec
from helpers.server import TEXTS, VOTES, WORDS, bag_bundle, described, linear_bundle

LONG = replace(
    TEXTS, inputs=(replace(WORDS, vocabulary=tuple(f"w{place}" for place in range(100))),), longest=(("T", 512),)
)
NETWORKS = {
    "text_cnn": lambda: TextCNN(LONG.inputs, 2, width=8, kernels=[3, 5], channels=8, dropout=0.0),
    "transformer": lambda: Transformer(
        LONG.inputs, 2, width=8, depth=1, heads=2, expansion=2, activation="gelu", dropout=0.0
    ),
}


def network_bundle(folder: Path, model: nn.Module) -> Path:
    (folder / "draft").mkdir()
    onnx.write(model.eval(), LONG, folder / "draft" / "model.onnx")
    return described(folder, folder / "draft", LONG)


@pytest.mark.parametrize(  # an export takes seconds, so that of one is enough for every day
    "name", ["transformer", pytest.param("text_cnn", marks=pytest.mark.slow)]
)
def test_texts_of_3_to_500_tokens_answer_together_as_alone(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    predictor = Predictor(network_bundle(tmp_path, NETWORKS[name]()), threads=1)
    texts = [" ".join(f"w{place}" for place in torch.randint(110, (length,)).tolist()) for length in (3, 40, 500)]
    requests = [Texts(LONG).ids([text]) for text in texts]
    together = predictor.predict(joined(requests))
    np.testing.assert_allclose(together, np.concatenate([predictor.predict(ids) for ids in requests]), atol=1e-5)
    assert len({tuple(row) for row in together.round(4)}) == 3


def test_requests_of_different_lengths_share_a_call() -> None:
    async def run() -> list[list[int]]:
        batcher = Batcher(lambda raw: calls.append(raw.shape) or raw.tolist(), 8, 8, lambda size: None, join=joined)
        rows = await asyncio.gather(*[batcher.submit(np.full((1, length), 2)) for length in (1, 3, 2)])
        batcher.stop()
        return [row for [row] in rows]

    calls: list[tuple[int, ...]] = []
    assert asyncio.run(run()) == [[2, 0, 0], [2, 2, 2], [2, 2, 0]]
    assert calls == [(3, 3)]


def test_a_network_that_is_run_sample_by_sample_sees_no_padding(tmp_path: Path) -> None:
    votes = VOTES + np.eye(5, 2)  # padding says no
    predictor = Predictor(bag_bundle(tmp_path, votes_VK=votes, sample_by_sample=True), threads=1)
    alone, together = padded([np.array([2])]), padded([np.array([2]), np.array([4] * 5)])
    np.testing.assert_allclose(predictor.predict(together)[0], predictor.predict(alone)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "network", "told"),
    [
        ({"vocabulary": ("good", "bad", "good")}, {}, "vocabulary: it holds twice 'good'"),
        ({"shape": ("T", "T")}, {}, r"spec.inputs.0.shape: \(T, T\) is not one axis"),
        ({"shape": (6,)}, {}, r"spec.inputs.0.shape: \(6\) is not one axis"),
        ({"longest": (("T", 65_537),)}, {}, "65537 tokens, at most 65536 are served"),
        ({"longest": ()}, {}, "is not one axis whose letter has a longest length"),
        ({}, {"length": 6}, r"'tokens' is tensor\(int64\) of \['batch', 6\], the data has \(batch, T\)"),
        ({}, {"votes_VK": VOTES[:4]}, "it does not answer a batch of 1: "),
        ({}, {"votes_VK": VOTES[:, :1]}, r"'logits' is .*\['batch', 1\], the data has \(batch, 2\)"),
        ({}, {"votes_VK": VOTES + np.eye(5, 2)}, "another one beside a longer text; it must not look at padding"),
        ({}, {"votes_VK": VOTES * np.nan}, "its answer to a text is not finite"),
    ],
)
def test_a_bundle_that_cannot_answer_texts_is_refused_in_one_line(
    tmp_path: Path, spec: dict[str, Any], network: dict[str, Any], told: str
) -> None:
    longest = spec.pop("longest", TEXTS.longest)
    wrong = replace(TEXTS, inputs=(replace(WORDS, **spec),), longest=longest)
    with pytest.raises(ConfigError, match=told) as refused:
        Predictor(bag_bundle(tmp_path, wrong, **network), threads=1)
    assert len(str(refused.value).splitlines()) == 1


def test_a_network_of_numbers_behind_a_description_of_texts_is_refused(tmp_path: Path) -> None:
    numbers = DataSpec.single("table", (3,), 1.0, (0.0,), (1.0,), ("no", "yes"))
    folder = linear_bundle(tmp_path, numbers, np.zeros((3, 2)))
    content = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(content | {"data": TEXTS.to_dict()}))
    with pytest.raises(ConfigError, match="it has 'input' in place of 'tokens'"):
        Predictor(folder, threads=1)


@pytest.mark.parametrize("cut", ["words", "characters", "bytes"])
def test_of_a_long_text_the_first_tokens_are_those_of_the_whole(cut: Cut) -> None:
    of_bytes = tuple(f"{byte:02x}" for byte in range(256))
    known = of_bytes if cut == "bytes" else ("caf\xe9", "\xe9", "\ud55c", "\u03c3")
    for letters in range(40):  # where the part that is read ends, between a letter and its accent or not
        text = "x" * letters + " Cafe\u0301 \u1112\u1161\u11ab \u03a3\u039f\u03a3" * 300
        spec = replace(TEXTS, inputs=(replace(WORDS, vocabulary=known, cut=cut),), longest=(("T", 50),))
        expected = Encoder(spec.input, 50)(text)
        assert len(Texts(spec).read([text])[0]) < 2000
        np.testing.assert_array_equal(Texts(spec).ids([text]), expected[None])


@pytest.mark.parametrize(
    ("item", "status", "told"),
    [
        (3, 422, "a number; each sample must be a text"),
        (None, 422, "null; each"),
        (True, 422, "true or false; each"),
        (["good"], 422, "a list; each"),
        ({}, 422, "an object of another form; each"),
        ({"text": "good", "more": 1}, 422, "an object of another form; each"),
        ({"text": 3}, 422, "an object of another form; each"),
        ("e" + "\u0301\u0315" * 60, 422, "more than 30 accents in a row"),
        (" " * 100_000, 413, "fewer than 37 words in its first 2368 letters"),
    ],
)
def test_what_is_no_text_is_told_in_a_sentence(item: object, status: int, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        Texts(TEXTS).ids(["good", item])
    assert refused.value.status == status
    assert refused.value.message.startswith(f"inputs[1]: {told}")


def test_texts_are_short_work_whatever_they_are_made_of() -> None:
    began = time.process_time()
    for text in ("e" + "\u0301\u0315" * 500_000, " " * 4_000_000, "a " * 2_000_000):
        with suppress(RequestError):
            Texts(TEXTS).ids([text] * 16)
    assert time.process_time() - began < 1


def test_a_body_of_more_parts_than_its_texts_have_is_refused_before_it_is_parsed() -> None:
    texts = Texts(TEXTS)
    texts.require_parts(json.dumps({"inputs": ['a, "b", [c], {d} \\'] * 8}).encode(), most=8)
    texts.require_parts(json.dumps({"inputs": [{"text": "a, [b]"}] * 8}).encode(), most=8)
    for part in (b'"",', b"[],", b"0,", b"{},", b'"\\"",'):
        with pytest.raises(RequestError, match="more parts than 8 texts"):
            texts.require_parts(b'{"inputs": [' + part * 50 + b"0]}", most=8)
    texts.require_parts(b'{"inputs": ["' + b'\\"' * 1_000_000, most=8)  # no end: the parser says so


def test_covering_a_word_costs_what_it_says() -> None:
    ids = Texts(TEXTS).ids(["good film, bad good"])[0]
    copies, masks = occlusion.covered(TEXTS, ids)
    drops = VOTES[ids].sum(axis=0)[1] - VOTES[copies].sum(axis=1)[:, 1]
    np.testing.assert_array_equal(occlusion.heat(drops, masks), [2, 0, 0, 0, 2])


def test_a_network_of_texts_takes_no_pictures() -> None:
    with pytest.raises(RequestError, match="this network takes texts, not pictures"):
        inputs.pictures(TEXTS, [b""])


def test_of_a_text_no_more_than_256_tokens_are_covered() -> None:
    ids = np.full(300, 2)
    copies, masks = occlusion.covered(TEXTS, ids)
    assert (copies.shape, masks.shape) == ((256, 300), (256, 256))
    assert np.unique(np.nonzero(copies == 1)[1]).tolist() == list(range(256))
