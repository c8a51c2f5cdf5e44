"""The transformer against the reference's forward passes, for two and three views (cases A to E of the golden README).

Outputs agree to 1e-5. Hidden states, which are up to ten times larger, agree to 2e-5: at t = 1000 the last bit of one
of the 256 sinusoid's frequencies, which differs between exp implementations, already moves them by 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.conftest import META, Golden, known
from wav.model import WAVTransformer
from wav.model.experts import ExpertOutput
from wav.model.rope import token_rope, video_rope
from wav.model.video import VideoOutput, pack

OUTPUT, HIDDEN = 1e-5, 2e-5
SIGNS = torch.tensor([-1.0, 1.0])  # of the sines in a table


class Case:
    """One golden case: its tensors, in this library's layouts."""

    def __init__(self, golden: Golden, name: str) -> None:
        sizes = {f"forward_v{case['n_view']}": case for case in golden.meta["cases"]}.get(name)
        if sizes is None:
            pytest.skip(f"{name}: not in the golden set {golden.folder}")
        self.data = golden.tensors(name)
        self.grid = tuple(sizes[k] for k in ("B", "n_view", "F", "H", "W"))
        b, v, f, h, w = self.grid
        self.latents = self.data["in.hidden_states"].view(b, v, f, h, w, -1).permute(0, 1, 5, 2, 3, 4)
        per_token = self.data["in.timestep"].view(b, v, f, h * w)
        assert torch.equal(per_token, per_token[:, :1, :, :1].expand_as(per_token))
        self.timestep = per_token[:, 0, :, 0]
        self.text = (self.data["in.encoder_hidden_states"], self.data["in.encoder_attention_mask"])
        self.value = (self.data["in.value_states"], self.data["in.value_timestep"][:, 0])
        self.action = (self.data["in.action_states"], self.data["in.action_timestep"][:, 0])
        self.history = self.data["in.history_action_state"]

    def check(self, got: Tensor, key: str, tolerance: float = OUTPUT) -> None:
        """``got`` in the reference's layout (video: rows (b v), tokens (f h w))."""
        if got.ndim == 6:
            got = pack(got)
        torch.testing.assert_close(got.reshape(self.data[key].shape), self.data[key], atol=tolerance, rtol=0)


CASES = known({f"forward_v{case['n_view']}": case for case in META.get("cases", [])}, "forward_v2", "forward_v3")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, golden: Golden) -> Case:
    return Case(golden, request.param)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def video(case: Case, transformer: WAVTransformer) -> VideoOutput:
    with torch.no_grad():
        return transformer.video(case.latents, case.timestep, *case.text)


@pytest.fixture(scope="module")
def value(case: Case, transformer: WAVTransformer, video: VideoOutput) -> ExpertOutput:
    with torch.no_grad():
        return transformer.value(*case.value, video.features)


def test_a_video_and_its_features(case: Case, video: VideoOutput) -> None:
    case.check(video.velocity, "A.video")
    for layer, feature in enumerate(video.features):
        case.check(feature, f"A.video_states_buffer.{layer}", HIDDEN)
    assert f"A.video_states_buffer.{len(video.features)}" not in case.data


def test_a_with_cached_text_and_without_head(case: Case, transformer: WAVTransformer, video: VideoOutput) -> None:
    context = transformer.video.encode_text(*case.text, cache=True)
    case.check(transformer.video(case.latents, case.timestep, context).velocity, "A.video")
    headless = transformer.video(case.latents, case.timestep, context, need_head=False)
    assert headless.velocity is None
    assert all(torch.equal(a, b) for a, b in zip(headless.features, video.features, strict=True))


def test_a_under_autograd(case: Case, transformer: WAVTransformer) -> None:
    with torch.enable_grad():
        case.check(transformer.video(case.latents, case.timestep, *case.text).velocity.detach(), "A.video")


def test_a2_without_text_mask(case: Case, transformer: WAVTransformer) -> None:
    case.check(transformer.video(case.latents, case.timestep, case.text[0]).velocity, "A2.video_no_text_mask")


def test_b_value_and_its_features(case: Case, value: ExpertOutput) -> None:
    case.check(value.velocity, "B.value")
    case.check(value.velocity, "C.value_reread")
    for layer, feature in enumerate(value.features):
        case.check(feature, f"B.value_states_buffer.{layer}", HIDDEN)


def test_b_from_a_cache(case: Case, transformer: WAVTransformer, video: VideoOutput) -> None:
    case.check(transformer.value(*case.value, transformer.value.cache(video.features)).velocity, "B.value")


def test_b2_value_with_history(case: Case, transformer: WAVTransformer, video: VideoOutput) -> None:
    got = transformer.value(*case.value, video.features, case.data["in.history_value_state"])
    case.check(got.velocity, "B2.value_with_history")


def test_c_action(case: Case, transformer: WAVTransformer, video: VideoOutput, value: ExpertOutput) -> None:
    got = transformer.action(*case.action, video.features, value.features, case.history)
    case.check(got, "C.action")
    cache = transformer.action.cache(video.features, value.features)
    case.check(transformer.action(*case.action, cache, history=case.history), "C.action")


def test_c2_without_history(case: Case, transformer: WAVTransformer, video: VideoOutput, value: ExpertOutput) -> None:
    case.check(transformer.action(*case.action, video.features, value.features), "C2.action_no_history")


def test_c3_without_value(case: Case, transformer: WAVTransformer, video: VideoOutput) -> None:
    case.check(transformer.action(*case.action, video.features, None, case.history), "C3.action_no_value")
    cache = transformer.action.cache(video.features)
    case.check(transformer.action(*case.action, cache, history=case.history), "C3.action_no_value")


def test_d_everything_in_one_call(case: Case, transformer: WAVTransformer) -> None:
    out = transformer(
        case.latents,
        case.timestep,
        *case.text,
        value_tokens=case.value[0],
        value_timestep=case.value[1],
        action_tokens=case.action[0],
        action_timestep=case.action[1],
        history=case.history,
    )
    case.check(out.video, "D.video")
    case.check(out.value, "D.value")
    case.check(out.action, "D.action")


def test_e_one_timestep_for_all_frames(case: Case, transformer: WAVTransformer) -> None:
    case.check(transformer.video(case.latents, case.timestep[:, -1], *case.text).velocity, "E.video_scalar_t")


def test_time_embedding(case: Case, transformer: WAVTransformer) -> None:
    temb, e = transformer.video.time_embed(torch.tensor([0.0, 250.0, 1000.0]))
    case.check(temb, "int.time_embed_0_250_1000.temb")
    case.check(e, "int.time_embed_0_250_1000.embedded")


@pytest.mark.parametrize("stream", ["video", "value", "action"])
def test_rope(case: Case, transformer: WAVTransformer, stream: str) -> None:
    cpu, dim = torch.device("cpu"), case.data[f"int.rope_{stream}.cos"].shape[-1]
    length = case.data[f"int.rope_{stream}.cos"].shape[1]
    if stream == "video":
        table = video_rope(dim, *case.grid[2:], tuple(transformer.config.rope_interpolation_scale), cpu)
    else:
        table = token_rope(dim, length, transformer.config[f"{stream}_rope_base"], cpu)
    case.check(table[0], f"int.rope_{stream}.cos")
    case.check(table[1] * SIGNS.repeat(dim // 2), f"int.rope_{stream}.sin")
