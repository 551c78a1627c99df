"""The bodies of the seam, one by one: who sees what, and what is kept."""

import torch

from heliostat.model.seam import Causal, Masked, Reading, Recording


def qkv(length: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, length, 4, 8, generator=chance),
        torch.randn(batch, length, 2, 8, generator=chance),
        torch.randn(batch, length, 2, 8, generator=chance),
    )


def test_a_recording_attends_as_its_inner_does_and_keeps_the_first() -> None:
    """A block that is computed again in the backward pass must not replace what carries the tape."""
    q, k, v = qkv(5, 0)
    recording = Recording(Causal())
    assert torch.equal(recording(0, q, k, v), Causal()(0, q, k, v))
    recording(0, q, k + 1, v + 1)
    recording(1, q, v, k)
    assert recording.written[0][0] is k and recording.written[0][1] is v and recording.written[1][0] is v


def test_reading_goes_on_where_others_stopped() -> None:
    q, k, v = qkv(7, 1)
    whole = Causal()(0, q, k, v)
    past, later = {0: (k[:, :4], v[:, :4])}, slice(4, 7)
    mask = (torch.arange(7) <= torch.arange(4, 7)[:, None])[None, None]
    own = Reading([past], mask, own=True)(0, q[:, later], k[:, later], v[:, later])
    torch.testing.assert_close(own, whole[:, later])
    two = Reading([past, {0: (k[:, later], v[:, later])}], mask, own=False)
    torch.testing.assert_close(two(0, q[:, later], k[:, later] * 9, v[:, later] * 9), whole[:, later])


def test_reading_takes_the_speaker_s_number_format() -> None:
    q, k, v = qkv(3, 2)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert Reading([{0: (k.bfloat16(), v.bfloat16())}], mask, own=False)(0, q, k, v).dtype is torch.float32
    mixed = Reading([{0: (k, v)}], torch.ones(1, 1, 3, 6, dtype=torch.bool), own=True)
    assert mixed(0, q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype is torch.bfloat16


def test_documents_see_only_themselves() -> None:
    numbers = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 4, 5]])
    mask = Masked.documents(numbers).mask
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    q, k, v = qkv(5, 3)
    packed = Masked(mask)(0, q, k, v)
    torch.testing.assert_close(packed[:1, 2:], Causal()(0, q[:1, 2:], k[:1, 2:], v[:1, 2:]))
