"""The adapter for lmms-eval: its logic with stand-ins for requests, and a task of the real one.

lmms-eval pulls in some eighty packages, so CI does without; the last test runs where it is there.
"""

import importlib.util
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from hrvlm.inference.chat import GenerateOptions, answer_batch, user_message
from hrvlm.inference.lmms_eval_adapter import HighResolutionVLM, cut_at
from tests.tiny import model_of, picture, processor_of

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    model_of().save_pretrained(folder)
    processor_of().save_pretrained(folder)
    return folder


class Cache:
    def __init__(self):
        self.kept = []

    def add_partial(self, method, request, answer):
        self.kept.append((method, request[0], answer))


def adapter_of(folder, documents, **options):
    adapter = HighResolutionVLM(pretrained=str(folder), device="cpu", **options)
    adapter.task_dict, adapter.cache_hook = {"task": {"test": documents}}, Cache()
    return adapter


def request_of(index, kind="image", **options):
    """What lmms-eval's ConfigurableMessagesTask.construct_requests makes."""

    def doc_to_messages(document):
        content = [{"type": kind, "url": image} for image in document["images"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": document["q"]}]}]

    return SimpleNamespace(
        args=(f"context {index}", doc_to_messages, options, index, "task", "test")
    )


DOCUMENTS = [
    {"images": [picture(60, 40)], "q": "one"},
    {"images": [picture(30, 64, seed=1), picture(16, 16)], "q": "a longer one"},
    {"images": [], "q": "none"},
]


def test_answers_come_in_order_whatever_the_batches(folder):
    lengths = [3, 5, 3]
    requests = [request_of(i, max_new_tokens=n, until=[]) for i, n in enumerate(lengths)]
    adapter = adapter_of(folder, DOCUMENTS, batch_size="2")
    answers = adapter.generate_until(requests)
    assert answers == [
        answer_batch(
            adapter.processor,
            adapter.model,
            [[user_message(document["q"], document["images"])]],
            GenerateOptions(max_new_tokens=n),
        )[0]
        for document, n in zip(DOCUMENTS, lengths, strict=True)
    ]
    kept = {context: answer for _, context, answer in adapter.cache_hook.kept}
    assert kept == {f"context {i}": answer for i, answer in enumerate(answers)}


def test_options_of_tasks_are_obeyed_or_refused(folder):
    adapter = adapter_of(folder, DOCUMENTS, max_new_tokens=4, system_prompt="Be brief.")
    (whole,) = adapter.generate_until([request_of(0, temperature=0, top_p=1.0, do_sample=False)])
    (cut,) = adapter.generate_until([request_of(0, until=[whole[2], "never"])])
    assert cut == whole[: whole.index(whole[2])] and cut_at("abc", ["c", "b", ""]) == "a"
    system, user = adapter._conversation(request_of(0))
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert user["content"][0] == {"type": "image", "image": DOCUMENTS[0]["images"][0]}
    assert adapter.generate_until([request_of(0, temperature=1, do_sample=False)]) == [whole]
    with pytest.raises(ValueError, match=r"\['top_p'\] are not supported"):
        adapter.generate_until([request_of(0, temperature=1, top_p=0.5)])
    with pytest.raises(ValueError, match="task, document 0: 'video' is not supported"):
        adapter.generate_until([request_of(0, kind="video")])
    with pytest.raises(NotImplementedError):
        adapter.loglikelihood([])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_lmms_eval_runs_a_task(folder, tmp_path):
    import datasets

    rows = {"image": [picture(60, 40), picture(30, 64, seed=1)], "q": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "tiny.yaml").write_text(
        textwrap.dedent(
            f"""
            task: tiny
            dataset_path: parquet
            dataset_kwargs: {{data_files: {{test: {tmp_path / "test.parquet"}}}}}
            test_split: test
            output_type: generate_until
            doc_to_visual: !function tiny_functions.visual
            doc_to_text: !function tiny_functions.text
            doc_to_target: q
            process_results: !function tiny_functions.results
            generation_kwargs: {{max_new_tokens: 5, until: []}}
            metric_list: [{{metric: length, aggregation: mean, higher_is_better: true}}]
            """
        )
    )
    (tmp_path / "task" / "tiny_functions.py").write_text(
        "visual = lambda doc: [doc['image'].convert('RGB')]\n"
        "text = lambda doc, lmms_eval_specific_kwargs=None: doc['q']\n"
        "results = lambda doc, results: {'length': len(results[0])}\n"
    )
    command = [sys.executable, "-m", "lmms_eval", "--model", "hrvlm", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={folder},device=cpu", "--tasks", "tiny"]
    command += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "out").rglob("*results.json")
    vlm, options = adapter_of(folder, []), GenerateOptions(max_new_tokens=5)
    answers = answer_batch(
        vlm.processor,
        vlm.model,
        [[user_message(q, [i])] for q, i in zip(rows["q"], rows["image"], strict=True)],
        options,
    )
    measured = json.loads(found.read_text())["results"]["tiny"]["length,none"]
    assert measured == sum(map(len, answers)) / 2
