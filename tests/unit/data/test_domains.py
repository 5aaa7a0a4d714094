from __future__ import annotations

import subprocess
import sys
import time

import pytest

from decentra.config import DataSpec
from decentra.data.domains import differing_held_out, embedded_domain, embedded_domains, held_out_digests
from decentra.errors import DataError
from decentra.ids import Digest, digest_of

SPEC = DataSpec()


@pytest.mark.parametrize("name", SPEC.domains)
def test_every_default_domain_is_here_cut_to_size_and_text(name: str) -> None:
    domain = embedded_domain(name, SPEC)
    assert len(domain.train) == SPEC.bytes_per_domain - SPEC.held_out_bytes
    assert len(domain.held_out) == SPEC.held_out_bytes
    assert b"\0" not in domain.train + domain.held_out
    assert domain.train.decode(errors="replace").count("\ufffd") < 50
    assert domain.held_out[:2000] not in domain.train


def test_domains_differ_and_look_like_their_names() -> None:
    texts = {name: embedded_domain(name, SPEC).train for name in embedded_domains()}
    assert len(set(texts.values())) == len(SPEC.domains) == 4
    assert texts["code"].count(b"def ") > 300
    assert texts["headers"].count(b"#include") > 300
    assert texts["math"].count(b"sympy") > 100
    assert texts["prose"].count(b"The ") > 200


def test_a_smaller_cut_is_the_beginning_of_a_larger_one() -> None:
    small = embedded_domain("code", DataSpec(bytes_per_domain=50_000, held_out_bytes=1024))
    assert embedded_domain("code", SPEC).train.startswith(small.train + small.held_out)


def test_another_process_reads_the_same_bytes_quickly() -> None:
    program = (
        "from decentra.config import DataSpec; from decentra.data.domains import held_out_digests; print(held_out_digests(DataSpec()))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    assert found.strip() == str(held_out_digests(SPEC))
    start_s = time.process_time()
    embedded_domain("headers", DataSpec(held_out_bytes=2000))  # not yet cached
    assert time.process_time() - start_s < 5.0


def test_digests_cover_embedded_domains_only_and_tell_differences() -> None:
    digests = held_out_digests(DataSpec(domains=("code", "our-recipes")))
    assert digests == {"code": digest_of(embedded_domain("code", SPEC).held_out)}
    assert differing_held_out(DataSpec(held_out=digests)) == ()
    assert differing_held_out(DataSpec(held_out={"math": Digest("0" * 64), **digests})) == ("math",)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("poetry", SPEC, "known: code, prose"),
        ("prose", DataSpec(bytes_per_domain=50_000_000), "asks for 50000000"),
        ("prose", DataSpec(bytes_per_domain=4096, held_out_bytes=4096), "nothing"),
    ],
)
def test_impossible_domains_are_data_errors(name: str, spec: DataSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        embedded_domain(name, spec)
