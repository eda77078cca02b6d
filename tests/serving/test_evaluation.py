"""lm_eval scores the demo through the server as the Python API does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from support import golden
from support.demo import fetch_demo
from support.program import started

import loader
from grokfetch.manifest.shipped import demo_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm_eval is not installed: pip install -e '.[test,eval]'",
    ),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{start}}}}"
target_delimiter: ""
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["."], max_gen_toks: 40}
metric_list: [{metric: exact_match}]
"""


def write_task(folder, name, kind, documents):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder.joinpath(f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)


def sentences():
    """Each sentence of the demo's text, divided into its first three words and the rest."""
    text = demo_folder().joinpath("grok-demo/text.txt").read_text()
    split = [sentence.rstrip(".").split() for sentence in text.splitlines()]
    return [(" ".join(words[:3]), words[3:]) for words in split]


def evaluated(url, tasks, out):
    """What lm_eval reports for each document of each task."""
    arguments = f"model=grok-demo,base_url={url}/completions,num_concurrent=4,max_length=512"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--tasks", "choice,generate", "--include_path", tasks, "--output_path", out]
    environment = {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--model_args", arguments, "--log_samples"],
        env={**os.environ, **environment, "NO_PROXY": "127.0.0.1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name in ("choice", "generate"):
        [samples] = out.rglob(f"samples_{name}_*.jsonl")
        found[name] = list(map(json.loads, samples.read_text().splitlines()))
    return found


def log_likelihood(engine, start, rest):
    """The sum of the log-probabilities of the tokens in `rest`, by the Python API."""
    prompt, whole = engine.tokenizer.encode(start), engine.tokenizer.encode(start + rest)
    scores = jax.nn.log_softmax(engine.full_logits([whole])[0], axis=-1)
    return sum(float(scores[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))


def test_log_likelihoods_are_those_of_the_python_api_and_texts_are_the_models(tmp_path):
    demo = fetch_demo(tmp_path / "grok")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    choices = [
        {"start": start, "choices": [" " + " ".join(rest[:4]), " " + " ".join(rest[3::-1])]}
        for start, rest in sentences()[:6]
    ]
    texts = [{"start": start, "rest": " " + " ".join(rest)} for start, rest in sentences()[-3:]]
    write_task(tasks, "choice", CHOICE, choices)
    write_task(tasks, "generate", GENERATE, texts)
    serve = ("serve", demo, "--port", 0, "--mesh", "model=1", "--dtype", "float32", "--slots", 4)
    with started(*serve, until="serving grok-demo on") as (_, lines):
        url = re.search(r"http://\S+/v1", lines[-1])[0]
        found = evaluated(url, tasks, tmp_path / "out")
    assert [sample["exact_match"] for sample in found["generate"]] == [1.0] * len(texts)
    assert [sample["acc"] for sample in found["choice"]] == [1.0] * len(choices)
    with loader.open_checkpoint(demo) as checkpoint:
        engine = loader.load_model(checkpoint, mesh=golden.ONE, dtype="float32")
        for sample in found["choice"]:
            document = sample["doc"]
            for (told, _), rest in zip(sample["filtered_resps"], document["choices"], strict=True):
                wanted = log_likelihood(engine, document["start"], rest)
                assert float(told) == pytest.approx(wanted, abs=1e-3)
