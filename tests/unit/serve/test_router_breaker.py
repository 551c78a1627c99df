"""A worker that fails is left alone, longer every time, and never for ever."""

from heliostat.serve.router_breaker import FAILURES, FIRST_REST, LONGEST_REST, Breaker


def test_rests_grow_and_have_an_end() -> None:
    breaker, now, rests = Breaker(), 0.0, []
    for _ in range(FAILURES - 1):
        assert not breaker.fail(now)
    for _ in range(12):
        assert breaker.fail(now) and not breaker.fail(now), "what was sent before the rest is no news"
        rests.append(breaker.until - now)
        assert not breaker.due(breaker.until - 0.001) and breaker.due(breaker.until)
        now = breaker.until
    assert rests[:3] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST] and rests[-1] == LONGEST_REST
    breaker.close()
    assert not breaker.fail(now)
