"""Generation with `LatentCache`: what the model does with a cache of whole keys and values.

Models, weights and prompts are those of ``test_decoders``: large scores, padding on the left.
"""

import copy
import warnings

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import flashsvd_compile as fsc
from tests.spelled import OPTIONS, no_pass_may_fail
from tests.test_decoders import FAMILIES as ALL_FAMILIES
from tests.test_decoders import NEW_TOKENS, WINDOW, decoder, prompts

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "opt"]
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
BEAMS = {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}

pytestmark = pytest.mark.usefixtures("fresh_inference")


def generated(model, cache, how, inputs=None):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # The argument's name changes with transformers' versions; this one is in all of them.
        warnings.simplefilter("ignore")
        return model.generate(
            **(inputs or prompts_of(0)), **how, max_new_tokens=NEW_TOKENS, past_key_values=cache,
            disable_compile=True, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip


def prompts_of(seed):
    torch.manual_seed(seed)
    return prompts()


def dense_cache(model):
    return transformers.DynamicCache(config=model.config)


def two_layers(family):
    """A decoder with two layers, so that one makes the angles and another reads them."""
    name, config, _ = ALL_FAMILIES[family]
    layers = {"num_hidden_layers": 2}
    ALL_FAMILIES["two layers"] = (name, {**config, **layers}, None)
    try:
        return decoder("two layers")
    finally:
        del ALL_FAMILIES["two layers"]


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_with_a_dense_cache(family, how):
    model = two_layers(family)
    want = generated(model, dense_cache(model), how)
    cache = fsc.LatentCache(model)
    got = generated(model, cache, how)
    assert torch.equal(got.sequences, want.sequences)
    assert cache.get_seq_length() == want.sequences.shape[1] - 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_logits_are_as_near_to_exact_ones(family):
    model = two_layers(family)
    want = generated(model, dense_cache(model), GREEDY)
    got = generated(model, fsc.LatentCache(model), GREEDY)
    exact_model = copy.deepcopy(model).double()
    exact = generated(exact_model, dense_cache(exact_model), GREEDY)
    assert torch.equal(exact.sequences, want.sequences)
    eps = torch.finfo(torch.float32).eps
    for have, eager, truth in zip(got.logits, want.logits, exact.logits, strict=True):
        budget = 1.1 * (eager - truth).abs().max() + 64 * eps * truth.abs().max()
        assert (have - truth).abs().max() <= budget


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_two_graphs_for_all_steps_and_all_caches(family):
    model = two_layers(family)
    want = generated(model, dense_cache(model), GREEDY)
    counters.clear()
    eager = model.forward
    model.forward = torch.compile(eager, backend="flashsvd", options=OPTIONS)
    with no_pass_may_fail():
        for _ in range(2):  # the second cache has hooks of its own
            got = generated(model, fsc.LatentCache(model), GREEDY)
            assert torch.equal(got.sequences, want.sequences)
            assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    # And a dense cache is none of its business.
    got = generated(model, dense_cache(model), GREEDY)
    assert torch.equal(got.sequences, want.sequences)


def test_prompts_longer_and_shorter_than_a_sliding_window():
    model = two_layers("mistral")
    for length in (2, WINDOW - 1, WINDOW, 3 * WINDOW):
        torch.manual_seed(length)
        ids = torch.randint(3, 61, (2, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want = generated(model, dense_cache(model), GREEDY, inputs)
        cache = fsc.LatentCache(model)
        assert torch.equal(generated(model, cache, GREEDY, inputs).sequences, want.sequences)
        latents, values, _ = next(iter(cache))
        assert latents.shape[1] == values.shape[1] == WINDOW - 1
        assert cache.layers[0].rotation.positions.shape[1] == WINDOW - 1


def test_assisted_generation_crops():
    model, assistant = two_layers("llama"), two_layers("llama")
    inputs = {name: x[1:] for name, x in prompts_of(0).items()}
    want = generated(model, dense_cache(model), GREEDY, inputs)
    cache, cropped = fsc.LatentCache(model), []
    crop = cache.crop
    cache.crop = lambda tokens: (cropped.append(tokens), crop(tokens))
    got = generated(model, cache, {**GREEDY, "assistant_model": assistant}, inputs)
    assert torch.equal(got.sequences, want.sequences)
    assert any(cropped)


def test_a_prompt_that_many_continue():
    """The pattern of transformers' docs: one cache of a prompt, a copy for each continuation."""
    model = two_layers("llama")
    torch.manual_seed(3)
    prompt = torch.randint(3, 61, (1, 9))
    cache = fsc.LatentCache(model)
    model(prompt, past_key_values=cache)
    kept = [x.clone() for x in next(iter(cache))[:2]]
    for length in (1, 4):
        ids = torch.cat((prompt, torch.randint(3, 61, (1, length))), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = generated(model, copy.deepcopy(cache), GREEDY, inputs)
        want = generated(model, dense_cache(model), GREEDY, inputs)
        assert torch.equal(got.sequences, want.sequences)
    assert all(map(torch.equal, kept, next(iter(cache))[:2]))
