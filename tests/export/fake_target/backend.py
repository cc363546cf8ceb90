"""Runs bundles of FakeTarget with the reference decoder, over all tokens again at each step."""

from collections.abc import Sequence
from time import perf_counter

import msgspec
import numpy as np
import torch

from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import GemmaConfig
from gemma_export.model.decoder import decoder
from gemma_runtime.bundle import Bundle
from gemma_runtime.session import FakeSession, Logits
from tests.export.fake_target.target import CONFIG


def open_fake_session(bundle: Bundle, threads: int | None, graph: str) -> FakeSession:
    config = msgspec.json.decode((bundle.directory / CONFIG).read_bytes(), type=GemmaConfig)
    with np.load(bundle.directory / bundle.manifest.graph(graph).file) as file:
        weights = hold({name: torch.from_numpy(file[name]).float() for name in file})

    def next_logits(tokens: Sequence[int]) -> Logits:
        ops = BatchOps(torch.tensor([tokens]), config.rms_norm_eps)
        with torch.inference_mode():
            logits: Logits = decoder(ops, config, weights.__getitem__)[0, -1].float().numpy()
        return logits

    return FakeSession(next_logits, bundle.manifest.context_length)


def profile_fake(
    bundle: Bundle, threads: int | None, chunks: Sequence[Sequence[int]]
) -> list[list[tuple[str, float]]]:
    session, calls = open_fake_session(bundle, threads, "decode"), []
    for chunk in chunks:
        started = perf_counter()
        session.prefill(chunk)
        calls.append([("decoder", perf_counter() - started)])
    return calls
