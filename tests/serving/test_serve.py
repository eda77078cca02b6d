"""Other people's clients use the server over HTTP, some badly, and get the right answers."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from support import golden
from support.program import SIMPLEST, started
from support.release import golden_folder
from support.serving import DEADLINE_S, EOS, P1, SERVED, WANTED, Held, error, letters, post, serving

from grokfetch.commands.serve import Jobs
from grokfetch.serving.gate import LARGEST_BODY
from loader.inference.batching import Batch
from loader.inference.engine import Engine


@pytest.fixture(scope="module")
def server():
    with serving(Jobs(Batch(golden.engine(), 4, chunk=16)), queue=100) as (url, worker):
        yield SimpleNamespace(url=url, worker=worker)


@pytest.fixture(scope="module")
def client(server):
    # Importing it takes half a second, which only the worker that runs these tests should pay.
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_gets_the_references_text_and_the_counts(client):
    assert [model.id for model in client.models.list()] == ["golden"]
    answer = client.completions.create(
        model="golden", prompt=letters(P1), max_tokens=12, temperature=0
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (WANTED[:12], "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(P1), 12)


def test_a_stream_is_the_text_piece_by_piece_and_ends_with_done(client, server):
    chunks = list(
        client.completions.create(
            model="golden",
            prompt=P1,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert [choice.text for chunk in chunks for choice in chunk.choices] == list(WANTED[:6])
    assert chunks[-1].usage.completion_tokens == 6
    raw = post(server.url, max_tokens=2, stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_across_tokens_ends_the_text_before_it(client, stream):
    stop = [WANTED[3] + "x", WANTED[5:8]]
    answer = client.completions.create(
        model="golden", prompt=P1, max_tokens=20, temperature=0, stop=stop, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == WANTED[:5]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_prompts_and_n_give_choices_in_order_each_the_same_as_alone(client):
    prompts = [P1, golden.prompt("p0")]
    settings = {"model": "golden", "max_tokens": 4, "temperature": 1.0, "top_p": 0.9}
    together = client.completions.create(prompt=prompts, n=2, seed=7, **settings).choices
    assert [choice.index for choice in together] == [0, 1, 2, 3]
    for choice in together:
        prompt, seed = prompts[choice.index // 2], 7 + choice.index % 2
        alone = client.completions.create(prompt=prompt, seed=seed, **settings)
        assert alone.choices[0].text == choice.text


def test_an_evaluation_harness_finds_the_logprobs_where_it_looks(server):
    prompts = [P1, golden.prompt("p2")]
    answer = post(server.url, prompt=prompts, echo=True, logprobs=1, max_tokens=1).json()
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        told = choice["logprobs"]
        assert choice["text"][:-1] == letters(prompt) == "".join(told["tokens"][:-1])
        assert told["text_offset"] == list(range(len(prompt) + 1))
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        for one, best in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
            assert one in best.values()
        # The token that was generated is the most probable one, as a harness checks.
        assert told["token_logprobs"][-1] == max(told["top_logprobs"][-1].values())
    scored = post(server.url, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    assert scored["logprobs"]["token_logprobs"] == pytest.approx(
        answer["choices"][0]["logprobs"]["token_logprobs"][:-1], abs=1e-5
    )


def test_sixteen_clients_at_once_of_which_half_leave_disturb_nobody(server):
    url = f"{server.url}/v1/completions"
    body = {"prompt": P1, "temperature": 0, "stream": True}

    async def stays(client):
        answer = await client.post(url, json=body | {"max_tokens": 30})
        parts = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(part)["choices"][0]["text"] for part in parts)

    async def leaves(client):
        async with client.stream("POST", url, json=body | {"max_tokens": 100}) as answer:
            async for line in answer.aiter_lines():
                if line:
                    return

    async def everybody():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=DEADLINE_S, limits=limits) as client:
            everyone = [stays(client) if n % 2 else leaves(client) for n in range(16)]
            return await asyncio.gather(*everyone)

    texts = asyncio.run(everybody())
    assert texts[1::2] == [WANTED[:30]] * 8
    numbers, end = "", time.monotonic() + DEADLINE_S
    while "slots_in_use 0.0" not in numbers or "queue_length 0.0" not in numbers:
        assert time.monotonic() < end
        numbers = httpx.get(f"{server.url}/metrics").text
    assert "grokfetch_disconnects_total 8.0" in numbers
    assert not server.worker.texts


def test_a_prompt_that_was_seen_before_is_counted_and_answered_alike():
    mesh, params = golden.placed(golden.ONE)
    engine = Engine(golden.CONFIG, params, mesh, "float32", prefix_cache=10**8)
    with serving(Jobs(Batch(engine, 1, chunk=16))) as (url, _):
        before = httpx.get(f"{url}/metrics").text
        prompt = [*P1, *range(3, 40)]
        answers = [post(url, prompt=prompt, max_tokens=3).json()["choices"] for _ in "12"]
        after = httpx.get(f"{url}/metrics").text
    assert answers[0] == answers[1]
    known = len(prompt) // 16 * 16
    counts = {"hits_total": 1.0, "tokens_total": float(known)}
    for name, count in counts.items():
        assert f"grokfetch_prefix_cache_{name} 0.0" in before
        assert f"grokfetch_prefix_cache_{name} {count}" in after
    assert f"grokfetch_prefix_cache_bytes {float(engine.prefix_cache.nbytes)}" in after


def test_a_full_queue_says_when_to_come_back_and_forgets_nobody_in_it():
    model = Held()
    with serving(model, queue=1, slots=1) as (url, _):
        answers = []
        waiting = [
            threading.Thread(target=lambda: answers.append(post(url, max_tokens=1)))
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
            assert model.added.acquire(timeout=DEADLINE_S)
        refused = post(url)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["code"] == "queue_full"
        assert post(url, prompt=[[5]] * 3).status_code == 400
        for _ in waiting:
            model.steps.release()
        for thread in waiting:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_a_client_that_leaves_before_the_first_token_frees_its_slot():
    model = Held()
    with serving(model) as (url, worker):
        for stream in (False, True):
            model.dropped.clear()
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{url}/v1/completions",
                    json={"prompt": [5], "stream": stream},
                    timeout=httpx.Timeout(DEADLINE_S, read=0.2),
                )
            assert model.dropped.wait(DEADLINE_S)
        assert not worker.texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_an_error_without_its_inner_life_and_the_next_request_works(
    stream, caplog
):
    model = Held()
    model.fails = True
    model.steps.release()
    with serving(model) as (url, _):
        answer = post(url, stream=stream)
        assert "could not go on" in answer.text
        assert "secret" not in answer.text
        assert answer.status_code == (200 if stream else 500)
        model.fails = False
        model.steps.release()
        assert post(url).json()["choices"][0]["text"] == letters([7])
    assert "a secret of the machine room" in caplog.text


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"prompt": None}, "prompt", 400),
        ({"prompt": []}, "prompt", 400),
        ({"prompt": [[]]}, "prompt", 400),
        ({"prompt": [5, 512]}, "prompt", 400),
        ({"prompt": [5, True]}, "prompt", 400),
        ({"prompt": "\ud800"}, "prompt", 400),
        ({"prompt": [5] * 128}, "prompt", 400),
        ({"max_tokens": 128}, "max_tokens", 400),
        ({"max_tokens": -1}, "max_tokens", 400),
        ({"max_tokens": 1.5}, "max_tokens", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"temperature": 10**400}, "temperature", 400),
        ({"top_p": 1.1}, "top_p", 400),
        ({"stop": ["x", 5]}, "stop", 400),
        ({"stop": ["x"] * 17}, "stop", 400),
        ({"n": 0}, "n", 400),
        ({"n": 128, "prompt": [[5], [6]]}, "n", 400),
        ({"logprobs": 6}, "logprobs", 400),
        ({"echo": "yes"}, "echo", 400),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400),
        ({"logit_bias": {"512": 1}}, "logit_bias", 400),
        ({"logit_bias": {"five": 1}}, "logit_bias", 400),
        ({"logit_bias": {"5": 101}}, "5", 400),
        ({"min_p": 1.1}, "min_p", 400),
        ({"repetition_penalty": 0}, "repetition_penalty", 400),
        ({"presence_penalty": 3}, "presence_penalty", 400),
        ({"min_tokens": 2}, "min_tokens", 400),
        ({"max_completion_tokens": 2}, "max_completion_tokens", 400),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", 400),
        ({"n": 2, "best_of": 1}, "best_of", 400),
        ({"best_of": 2, "stream": True}, "best_of", 400),
        ({"typical_p": 0.9}, "typical_p", 400),
        ({"use_beam_search": True}, "use_beam_search", 400),
        ({"mirostat": True}, "mirostat", 400),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "include_obfuscation",
            400,
        ),
        ({"stream": True, "stream_options": {"x": 1}}, "x", 400),
        ({"model": "gpt-4"}, "model", 404),
    ],
)
def test_a_malformed_request_is_refused_with_the_name_of_the_field(server, fields, param, status):
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=json.dumps({"prompt": [5], "max_tokens": 1} | fields),
    )
    assert answer.status_code == status
    assert error(answer)["param"] == param
    assert error(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/completions", b"", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/completions", b"\xff", 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b" " * (LARGEST_BODY + 1), 413),
        ("/tokenize", b'{"prompt": "\\ud800"}', 400),
        ("/v1/chat/completions", b"{}", 400),
        ("/v1/nothing", b"{}", 404),
        ("/v1/models", b"{}", 405),
    ],
)
def test_what_is_no_request_is_an_error_in_the_same_form(server, path, content, status):
    answer = httpx.post(f"{server.url}{path}", content=content)
    assert answer.status_code == status
    assert error(answer)["message"]
    assert (status == 404) == ("GET / lists all" in error(answer)["message"])


def test_values_that_change_nothing_pass_under_any_name(server):
    plain = post(server.url, max_tokens=2).json()["choices"]
    same = {
        "best_of": 1,
        "repetition_penalty": 1.0,
        "repeat_penalty": 1,
        "repeat_last_n": 64,
        "min_p": 0,
        "typical_p": 1,
        "ignore_eos": False,
        "min_tokens": 0,
        "skip_special_tokens": True,
        "use_beam_search": False,
        "stop_token_ids": [],
        "cache_prompt": True,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "stop": [""],
        "max_tokens": 2.0,
        "seed": None,
        "whatever": None,
    }
    assert post(server.url, **same).json()["choices"] == plain
    assert len(post(server.url, n=2, best_of=2.0, max_tokens=1).json()["choices"]) == 2
    assert (
        post(server.url, prompt=[float(token) for token in P1], max_tokens=2).json()["choices"]
        == plain
    )


def test_each_chunk_tells_the_usage_where_it_is_asked_for(server):
    def usages(**options):
        answer = post(server.url, max_tokens=3, stream=True, stream_options=options)
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line).get("usage", "none") for line in lines]

    assert usages(include_usage=False) == ["none"] * 3
    *before, last = usages(include_usage=True, include_obfuscation=False)
    assert before == [None] * 3
    assert last["completion_tokens"] == 3
    told = usages(include_usage=True, continuous_usage_stats=True)
    assert [one["completion_tokens"] for one in told] == [1, 2, 3, 3]


def test_offsets_count_from_the_beginning_of_the_prompt(server):
    for prompt in (P1, letters(P1)):
        told = post(server.url, prompt=prompt, max_tokens=3, logprobs=1).json()["choices"][0]
        assert told["logprobs"]["text_offset"] == [len(P1), len(P1) + 1, len(P1) + 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_tokens_and_logprobs_end_where_a_stop_string_ends_the_text(client, stream, echo):
    stop = WANTED[5:8]
    answer = client.completions.create(
        model="golden",
        prompt=P1,
        max_tokens=20,
        temperature=0,
        stop=stop,
        logprobs=1,
        echo=echo,
        stream=stream,
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    told = [choice.logprobs.tokens for choice in choices if choice.logprobs]
    wanted = (letters(P1) if echo else "") + WANTED[:5]
    assert "".join(token for tokens in told for token in tokens) == wanted
    assert "".join(choice.text for choice in choices) == wanted


def test_the_best_of_several_texts_are_told_and_all_are_counted(server):
    settings = {"temperature": 1.0, "seed": 5, "max_tokens": 4}
    every = post(server.url, n=6, logprobs=0, **settings).json()
    best = post(server.url, n=2, best_of=6, **settings).json()

    def mean(choice):
        return -sum(choice["logprobs"]["token_logprobs"])

    ranked = sorted(every["choices"], key=mean)[:2]
    assert [choice["text"] for choice in best["choices"]] == [one["text"] for one in ranked]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"] == every["usage"]


def test_what_vllms_clients_send_changes_the_text_as_it_says(client):
    def text(**fields):
        (choice,) = client.completions.create(
            model="golden", prompt=P1, temperature=0, extra_body=fields
        ).choices
        return choice.text, choice.finish_reason

    toward_end = {str(EOS): 100}
    assert text(max_completion_tokens=3) == (WANTED[:3], "length")
    assert text(logit_bias=toward_end) == ("", "stop")
    assert text(logit_bias=toward_end, min_tokens=3) == (WANTED[:3], "stop")
    assert text(logit_bias=toward_end, ignore_eos=True, max_tokens=2) == ("", "length")
    shown = {"ignore_eos": True, "skip_special_tokens": False, "add_special_tokens": False}
    assert text(logit_bias=toward_end, max_tokens=2, **shown) == (letters([EOS]) * 2, "length")
    assert len(set(text(presence_penalty=2, frequency_penalty=2, max_tokens=9)[0])) > 1
    assert text(logit_bias={"9": 100}, repetition_penalty=100, max_tokens=2)[0][0] == letters([9])
    assert text(min_p=1, temperature=1.0, max_tokens=5) == (WANTED[:5], "length")
    # Stop strings are ignored before min_tokens.
    assert text(stop=WANTED[1], min_tokens=3, max_tokens=5) == (WANTED[:5], "length")


def test_the_end_of_a_long_prompt_is_kept_where_that_is_asked_for(server):
    long = [7] * 200 + P1
    kept = post(server.url, prompt=long, truncate_prompt_tokens=len(P1), max_tokens=3, echo=True)
    (choice,), usage = kept.json()["choices"], kept.json()["usage"]
    assert choice["text"] == letters(P1) + WANTED[:3]
    assert usage["prompt_tokens"] == len(P1)
    most = post(server.url, prompt=letters(long), truncate_prompt_tokens=-1, max_tokens=8)
    assert most.json()["usage"]["prompt_tokens"] == SERVED.context - 8


def test_chat_is_refused_because_it_is_a_base_model(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="base model"):
        client.chat.completions.create(model="golden", messages=[{"role": "user", "content": "x"}])


def test_the_tokenizer_can_be_asked_as_evaluation_harnesses_do(server):
    assert httpx.get(f"{server.url}/tokenizer_info").json()["eos_token"] == letters([EOS])
    text = letters([7, 300])
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == [7, 300]
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()
    assert back == {"prompt": text}
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [-1]}).status_code == 400


@pytest.fixture
def folder(tmp_path):
    return golden_folder(tmp_path / "golden")


@pytest.mark.slow
def test_sigterm_under_load_answers_what_is_at_work_and_ends_with_success(folder):
    command = ("serve", folder, "--port", 0, "--slots", 2, *SIMPLEST)
    with started(*command, until="http://") as (process, lines):
        assert "compiled for up to 2 texts at once" in lines[-2]
        url = "http://" + lines[-1].split("http://")[1].split("/")[0]
        body = {"prompt": P1, "temperature": 0, "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE_S) as answer:
            streamed = answer.iter_lines()
            first = next(streamed)
            process.send_signal(signal.SIGTERM)
            assert "no new requests" in process.stderr.readline()
            texts = [first, *streamed]
        tokens = "".join(
            json.loads(line[6:])["choices"][0]["text"]
            for line in texts
            if line.startswith("data: {")
        )
        assert [int(token) for token in tokens.split()][:32] == [
            ord(letter) - 0x4E00 for letter in WANTED
        ]
        assert len(tokens.split()) == 40
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.wait(DEADLINE_S) == 0
        assert "Traceback" not in process.stderr.read()
