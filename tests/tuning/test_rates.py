"""What a device reaches is measured once, kept, and counts in the plans that follow."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import flashsvd_compile as fsc
from flashsvd_compile import pipeline
from flashsvd_compile.tuning import rates
from flashsvd_compile.tuning.rates import Rates, rates_of

CPU = torch.device("cpu")
RATES = Rates({2: 1e10, 4: 5e10}, 1e10, 4e8)


@pytest.fixture
def measurements(monkeypatch):
    """How often something was measured; nothing is."""
    found = []

    def measured(device):
        found.append(device)
        return RATES

    monkeypatch.setattr(rates, "measured", measured)
    return found


def test_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(
        rates, "MATMULS", {"cpu": {2: (torch.bfloat16, 32), 4: (torch.float32, 64)}}
    )
    monkeypatch.setattr(rates, "COPIED_BYTES", {"cpu": 2**16})
    found = rates.measured(CPU)
    assert set(found.macs_per_s) == {2, 4}
    assert all(x > 0 for x in (*found.macs_per_s.values(), found.bytes_per_s, found.exps_per_s))


def test_once(tmp_path, measurements):
    assert rates_of(CPU, tmp_path, may_measure=False) is None
    assert rates_of(CPU, tmp_path, may_measure=True) == RATES
    assert rates_of(CPU, tmp_path, may_measure=True) == RATES
    assert rates_of(CPU, tmp_path, may_measure=False) == RATES
    assert len(measurements) == 1


def test_other_threads_are_another_device(tmp_path, measurements, monkeypatch):
    rates_of(CPU, tmp_path, may_measure=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert rates_of(CPU, tmp_path, may_measure=False) is None


@pytest.mark.parametrize(
    "spoiled", [{}, {"macs_per_s": {"4": 1.0}}, {"macs_per_s": {"2": -1.0, "4": 1.0}}, [1], None]
)
def test_a_spoiled_record_is_measured_anew(tmp_path, measurements, spoiled, caplog):
    rates_of(CPU, tmp_path, may_measure=True)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    kept = record["rates"] | spoiled if isinstance(spoiled, dict) and spoiled else spoiled
    path.write_text(json.dumps(record | {"rates": kept}))
    with caplog.at_level(logging.WARNING):
        assert rates_of(CPU, tmp_path, may_measure=True) == RATES
    assert "written anew" in caplog.text
    assert len(measurements) == 2


def test_a_device_that_cannot_be_measured_has_the_rates_of_its_kind(tmp_path, monkeypatch):
    def measured(device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(rates, "measured", measured)
    assert rates_of(CPU, tmp_path, may_measure=True) is None
    assert rates_of(torch.device("meta"), tmp_path, may_measure=True) is None


def attention(pq, pk, pv, vq, vk, vv):
    return F.scaled_dot_product_attention(pq @ vq, pk @ vk, pv @ vv)


def test_plans_follow_the_measured_rates(monkeypatch):
    latents = [torch.randn(1, 2, 32, 24) for _ in range(3)]
    factors = [torch.randn(2, 24, 32) for _ in range(3)]

    def seconds(options=None):
        (site,) = fsc.explain(attention, *latents, *factors, options=options).sites
        return site.plan.seconds

    assumed = seconds()
    slow = replace(RATES, macs_per_s={2: 1e6, 4: 1e6})
    monkeypatch.setattr(pipeline, "rates_of", lambda *_: slow)
    assert seconds() > 10 * assumed
    assert seconds({"autotune": False}) == assumed
