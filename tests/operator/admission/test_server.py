"""The webhook over HTTP: what is well asked is answered, what is not is told so, and nothing that goes wrong here refuses a run."""

import asyncio
import gzip
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from atelier_operator.admission import server
from atelier_operator.admission.review import LONGEST_WARNING, Verdict, answer
from atelier_operator.admission.server import LARGEST_BYTES, SMALL_BYTES
from reviews import Asked, Profiles, asked, profiles, review
from run_stories import raw_run

Object = dict[str, Any]
BROKEN = raw_run(hyperparameters={"steps": 0})


def with_webhook(story: Callable[[Asked], Awaitable[None]], find: Any = None, *, warm: bool = True) -> None:
    async def run() -> None:
        async with asked(find, warm=warm) as webhook:
            await story(webhook)

    asyncio.run(run())


def test_a_sound_run_is_let_in_without_a_word() -> None:
    async def story(webhook: Asked) -> None:
        assert await webhook.ask(review(raw_run())) == {"uid": review({})["request"]["uid"], "allowed": True}
        assert webhook.count("CREATE", "allowed") == 1

    with_webhook(story)


def test_a_refusal_has_the_code_the_reason_and_the_words() -> None:
    async def story(webhook: Asked) -> None:
        answer = await webhook.ask(review(BROKEN))
        assert answer["allowed"] is False
        assert (answer["status"]["code"], answer["status"]["reason"]) == (422, "Invalid")
        assert "spec.hyperparameters.steps is 0; must be" in answer["status"]["message"]
        forbidden = await webhook.ask(review(raw_run(), raw_run(hyperparameters={"steps": 7})))
        assert (forbidden["status"]["code"], forbidden["status"]["reason"]) == (403, "Forbidden")
        assert (webhook.count("CREATE", "refused"), webhook.count("UPDATE", "refused")) == (1, 1)

    with_webhook(story, ForTheSecond())


class ForTheSecond(Profiles):
    """Allows the run as it was asked about last, and no other: the change is one that makes it worse."""

    def __init__(self) -> None:
        super().__init__(profiles())
        self.asked = 0

    def __call__(self, kind: str, namespace: str, name: str) -> Any:
        self.asked += 1
        return profiles(limits={"nodes": 1} if self.asked == 2 else {})(kind, namespace, name)


def test_a_cold_inventory_refuses_nothing() -> None:
    async def story(webhook: Asked) -> None:
        answer = await webhook.ask(review(BROKEN))
        assert answer["allowed"] is True
        assert "has not read the profiles yet" in answer["warnings"][0]
        assert webhook.count("CREATE", "cold") == 1

    with_webhook(story, warm=False)


def test_a_warning_is_one_printable_line_of_a_header() -> None:
    (warning,) = answer("uid", Verdict("warned", "a\n\x00b" + "\u202ec" * 300))["response"]["warnings"]
    assert len(warning) == LONGEST_WARNING
    assert warning.startswith("a  b c c")
    assert warning.isprintable()


MALFORMED: dict[str, Any] = {
    "no JSON": b"{",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe{}",
    "nested without end": b"[" * 100_000,
    "a number of five thousand digits": b"1" * 5000,
    "a list": b"[]",
    "another kind": json.dumps({"apiVersion": "v1", "kind": "Pod"}).encode(),
    "another version": json.dumps(review(raw_run()) | {"apiVersion": "admission.k8s.io/v1beta1"}).encode(),
    "no request": json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}).encode(),
    "no object": json.dumps(review(None)).encode(),  # type: ignore[arg-type]
    "no metadata": json.dumps(review({"spec": {}})).encode(),
    "an update without the old object": json.dumps(review(raw_run(), operation="UPDATE")).encode(),
    "a uid that is a number": json.dumps(review(raw_run(), uid=7)).encode(),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_review_is_http_400(body: bytes) -> None:
    async def story(webhook: Asked) -> None:
        status, text = await webhook.post(data=body)
        assert status == 400
        assert text.strip()
        assert webhook.count("other", "malformed") == 1

    with_webhook(story)


def padded(size: int) -> bytes:
    """A review of so many bytes."""
    run = raw_run()
    run["metadata"]["annotations"] = {"a": ""}
    text = json.dumps(review(run))
    run["metadata"]["annotations"]["a"] = "x" * (size - len(text))
    return json.dumps(review(run)).encode()


def test_the_largest_review_is_answered_and_a_larger_one_is_http_413() -> None:
    async def story(webhook: Asked) -> None:
        for size in (SMALL_BYTES, SMALL_BYTES + 1, LARGEST_BYTES):
            body = padded(size)
            assert len(body) == size
            status, text = await webhook.post(data=body)
            assert status == 200
            assert json.loads(text)["response"]["allowed"] is True
        assert (await webhook.post(data=padded(LARGEST_BYTES + 1)))[0] == 413

    with_webhook(story)


def test_a_small_body_that_unfolds_is_http_413() -> None:
    async def story(webhook: Asked) -> None:
        body = gzip.compress(padded(40 << 20))
        assert len(body) < LARGEST_BYTES
        assert (await webhook.post(data=body, headers={"Content-Encoding": "gzip"}))[0] == 413

    with_webhook(story)


def test_a_failure_of_its_own_is_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: str) -> Any:
        raise KeyError("mine")

    async def story(webhook: Asked) -> None:
        answer = await webhook.ask(review(raw_run()))
        assert answer["allowed"] is True
        assert "the check itself has failed" in answer["warnings"][0]
        assert webhook.count("CREATE", "error") == 1

    with_webhook(story, broken)
    assert "KeyError: 'mine'" in caplog.text


def test_a_check_that_takes_too_long_is_no_refusal_and_holds_up_neither_loop_nor_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One hangs, more come than may wait: all are let in, and afterwards everything is as before."""
    monkeypatch.setattr(server, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(server, "MOST_WAITING", 3)
    go_on = threading.Event()

    def slow(*place: str) -> Any:
        go_on.wait(60)
        return profiles()(*place)

    async def story(webhook: Asked) -> None:
        try:
            answers = await asyncio.gather(*(webhook.ask(review(BROKEN)) for _ in range(5)))
        finally:
            go_on.set()
        assert [each["allowed"] for each in answers] == [True] * 5
        assert sorted(each["warnings"][0].partition(": ")[2][:22] for each in answers) == [
            *["the check took too lon"] * 3,
            *["the operator has too m"] * 2,
        ]
        assert (webhook.count("CREATE", "late"), webhook.count("CREATE", "busy")) == (3, 2)
        for _ in range(200):
            if (await webhook.ask(review(BROKEN)))["allowed"] is False:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("it does not recover")

    with_webhook(story, slow)


def test_nothing_but_validate_is_served() -> None:
    async def story(webhook: Asked) -> None:
        webhook.url = webhook.url.replace("validate", "metrics")
        assert (await webhook.post(data=b"{}"))[0] == 404

    with_webhook(story)
