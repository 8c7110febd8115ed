import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hrvlm.data.config import FineVision, JsonL, Parquet, Synthetic
from hrvlm.data.sources import RowSource, open_source
from hrvlm.training.samples import SampleMaker, write_report
from hrvlm.training.stream import RowDataset, SampleStream
from tests.tiny import picture, processor_of

TEMPLATES = {
    "chatml": None,
    "bos": "{{ '<eos>' }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}",
}
TURNS = [
    {"user": "What is it? é", "assistant": "A häuschen."},
    {"user": "Sure?", "assistant": "Yes"},
]


def maker(tmp_path=None, max_length=None, processor=None):
    return SampleMaker(processor or processor_of(), max_length, tmp_path)


def learned(sample, tokenizer):
    """The runs of tokens with a label, as text."""
    ids, labels = sample["input_ids"], sample["labels"]
    on = labels != -100
    assert torch.equal(labels[on], ids[on])
    edges = torch.diff(on.int(), prepend=torch.tensor([0]), append=torch.tensor([0]))
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_is_on_the_answers_and_tokens_are_those_of_inference(name):
    processor = processor_of()
    if TEMPLATES[name]:
        processor = type(processor)(processor.image_processor, processor.tokenizer, TEMPLATES[name])
    images = [picture(32, 16), picture(16, 48, seed=1)]
    sample = maker(processor=processor)({"images": images, "texts": TURNS}, "row 0")
    chat = [
        {"role": "user", "content": [{"type": "image", "image": i} for i in images]},
        {"role": "assistant", "content": TURNS[0]["assistant"]},
        {"role": "user", "content": TURNS[1]["user"]},
        {"role": "assistant", "content": TURNS[1]["assistant"]},
    ]
    chat[0]["content"].append({"type": "text", "text": TURNS[0]["user"]})
    expected = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(sample["input_ids"], expected["input_ids"][0])
    assert torch.equal(sample["pixel_values"], expected["pixel_values"])
    ends = ("<|im_end|>\n", "<|im_end|>\n") if name == "chatml" else ("", "")
    said = [turn["assistant"] + end for turn, end in zip(TURNS, ends, strict=True)]
    assert learned(sample, processor.tokenizer) == said


def test_markers_place_the_images():
    row = {
        "images": [picture(16, 16), picture(32, 16)],
        "texts": [
            {"user": "a<image>b", "assistant": "c"},
            {"user": "<image>d", "assistant": "e"},
        ],
    }
    sample = maker()(row, "row 0")
    text = processor_of().tokenizer.decode(sample["input_ids"])
    image = "<|image|>"
    assert f"a{image}b<|im_end|>" in text and f"{image * 2}d<|im_end|>" in text


def test_what_is_left_out_is_counted_and_named(tmp_path):
    make = maker(tmp_path / "run", max_length=60)
    good = {"image": picture(16, 16), "question": "?", "answer": "yes"}
    bad = {
        "corrupt": (good | {"image": b"\x89PNG no picture"}, "bad image"),
        "missing": (good | {"image": str(tmp_path / "none.png")}, "bad image"),
        "long": (good | {"answer": "y" * 60}, "too long"),
        "null": (good | {"answer": None}, "bad row"),
        "marker": (good | {"question": "<image><image>"}, "bad row"),
        "token": (good | {"question": "an <|image|>"}, "bad row"),
        "no object": ("{broken", "bad row"),
        "no list": ({"texts": 5}, "bad row"),
        "ragged": ({"texts": {"user": ["a", "b"], "assistant": ["c"]}}, "bad row"),
    }
    assert make(good, "good") is not None
    for _ in range(2):  # a second epoch
        for name, (row, _) in bad.items():
            assert make(row, name) is None, name
    report = write_report(tmp_path / "run")
    assert report["skipped"] == {"bad image": 2, "too long": 1, "bad row": 6}
    assert {r["row"]: r["reason"] for r in report["rows"]} == {n: r for n, (_, r) in bad.items()}
    assert json.loads((tmp_path / "run" / "data_report.json").read_text()) == report
    details = {r["row"]: r["details"] for r in report["rows"]}
    assert "none.png" in details["missing"] and details["long"].endswith("above 60")


def test_a_source_with_nothing_to_learn_from_ends_the_run():
    make = maker()
    with pytest.raises(ValueError, match=r"1000 rows one after the other .* the last: null"):
        for _ in range(1000):
            make({"question": "?", "answer": None}, "null")


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i in range(7):
        picture(16, 16 + 8 * i, seed=i).save(tmp_path / f"{i}.png")
        texts = [{"user": "?", "assistant": f"number {i}"}]
        rows.append({"images": [f"{i}.png"], "texts": texts})
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    return tmp_path, rows


def datasets_of(tmp_path, rows):
    import datasets

    text = datasets.Value("string")
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": text, "assistant": text}),
        }
    )
    full = [row | {"images": [str(tmp_path / row["images"][0])]} for row in rows]
    return datasets.Dataset.from_list(full, features=features)


def answers(data):
    tokenizer = processor_of().tokenizer
    return [learned(sample, tokenizer)[0].removesuffix("<|im_end|>\n") for sample in data]


def test_every_kind_of_file_gives_the_same_samples(folder, monkeypatch):
    tmp_path, rows = folder
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = datasets_of(tmp_path, rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    embedded = dataset.map(lambda row: row)  # writes the bytes of the files into the table
    embedded.to_parquet(str(tmp_path / "rows.parquet"))
    configs = [
        JsonL(str(tmp_path / "rows.jsonl")),
        FineVision(str(tmp_path / "saved")),
        FineVision(str(tmp_path / "saved"), streaming=True, limit=7),
        Parquet(str(tmp_path / "rows.parquet")),
        Parquet(str(tmp_path / "rows.parquet"), streaming=True, limit=7),
    ]
    expected = None
    for config in configs:
        data = RowDataset([open_source(config, indexed=True)], maker())
        got = [data[i] for i in range(len(data))]
        assert answers(got) == [f"number {i}" for i in range(7)]
        expected = expected or got
        for a, b in zip(got, expected, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def first(stream, count, **options):
    loader = DataLoader(stream, batch_size=None, **options)
    return [sample for sample, _ in zip(loader, range(count), strict=False)]


def test_a_stream_is_divided_among_processes_and_workers(folder):
    tmp_path, rows = folder
    datasets_of(tmp_path, rows).save_to_disk(str(tmp_path / "saved"))
    for config in (
        JsonL(str(tmp_path / "rows.jsonl")),
        FineVision(str(tmp_path / "saved"), streaming=True, buffer=3),
    ):
        said = []
        for process in range(2):
            stream = SampleStream([open_source(config)], maker(), seed=1)
            stream.divide(process, 2)
            loader = DataLoader(stream, batch_size=None, num_workers=2)
            said += answers(sample for sample, _ in zip(loader, range(4 - process), strict=False))
        assert sorted(said) == [f"number {i}" for i in range(7)]


def test_a_stream_goes_on_in_a_new_order_and_repeats_by_seed(folder):
    source = open_source(JsonL(str(folder[0] / "rows.jsonl")))
    said = answers(first(SampleStream([source], maker(), seed=3), 14))
    assert sorted(said[:7]) == sorted(said[7:]) and said[:7] != said[7:]
    assert answers(first(SampleStream([source], maker(), seed=3), 14)) == said
    assert answers(first(SampleStream([source], maker(), seed=4), 14)) != said


def test_weights_mix_the_sources():
    texts = [[{"question": "?", "answer": letter}] for letter in "ab"]
    sources = [RowSource(rows[0]["answer"], rows) for rows in texts]
    said = answers(first(SampleStream(sources, maker(), weights=[3, 1], seed=0), 400))
    assert 270 < said.count("a") < 330


def test_drawn_pictures_come_in_order_and_are_divided():
    source = open_source(Synthetic(seed=5, options={"max_characters": 6}))

    def said(count, shard, shards):
        rows = source.rows(0, 0, shard, shards)
        return [row["texts"] for (_, row), _ in zip(rows, range(count), strict=False)]

    whole, halves = said(4, 0, 1), [said(2, 0, 2), said(2, 1, 2)]
    assert [halves[i % 2][i // 2] for i in range(4)] == whole
    with pytest.raises(ValueError, match="it has no end; give it a `count`"):
        open_source(Synthetic(), indexed=True)
    with pytest.raises(ValueError, match="no_such"):
        open_source(Synthetic(options={"no_such": 1}))
    assert np.asarray(source[0][1]["images"][0]).std() > 0
