"""Any request is understood or refused, and a stop text is found wherever it is."""

import json

from hypothesis import given
from hypothesis import strategies as st
from support.serving import SERVED

from grokfetch.serving.fields import Refused
from grokfetch.serving.requests import read_completion
from grokfetch.serving.text import Stops

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "n",
        "best_of",
        "echo",
        "logprobs",
        "stream",
        "stream_options",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_tokens",
        "ignore_eos",
        "skip_special_tokens",
        "truncate_prompt_tokens",
        "model",
        "user",
        "suffix",
        "x",
    ]
)


@given(st.dictionaries(fields, json_values) | json_values)
def test_any_json_is_a_request_or_is_refused_with_a_known_status(body):
    try:
        wanted = read_completion(body, SERVED)
        encoded = [
            wanted.truncated((5,) if isinstance(one, str) else one, SERVED)
            for one in wanted.prompts
        ]
        generations = wanted.generations(encoded, SERVED)
    except Refused as why:
        refused = why
    else:
        refused = None
    if refused is not None:
        assert refused.status in {400, 404}
        assert json.dumps([refused.message, refused.param])
    else:
        assert len(generations) == len(wanted.prompts) * wanted.candidates
        assert all(len(one.prompt) + one.max_tokens <= SERVED.context for one in generations)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_text_is_found_in_whatever_pieces_it_comes(parts, texts):
    stops = Stops(texts)
    shown = "".join(stops.push(part) for part in parts) + stops.finish()
    # The first moment at which a stop text is complete ends the stream; of several that begin
    # before it, the earliest counts.
    whole = ""
    for part in parts:
        whole += part
        found = [at for at in (whole.find(text) for text in texts) if at >= 0]
        if found:
            assert stops.found
            assert shown == whole[: min(found)]
            return
    assert not stops.found
    assert shown == whole
