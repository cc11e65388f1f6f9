import pytest

from atelier_api.errors import DataError
from atelier_runtime.data.funnel import Fate, Funnel, refuse_empty


def test_every_file_is_counted_once() -> None:
    funnel = Funnel(10)
    funnel.reject("a.png", Fate.UNREADABLE, "cut short")
    funnel.reject("b.png", Fate.TOO_SMALL, "4 x 4")
    funnel.reject("c.png", Fate.TOO_SMALL, "5 x 5")
    funnel.reject("d.mp4", Fate.TOO_SHORT, "3 frames")
    funnel.reject("e.png", Fate.NO_CAPTION, "none")
    report = funnel.report()
    assert (report.found, report.kept) == (10, 5)
    assert (report.unreadable, report.too_small, report.no_caption, report.too_short) == (1, 2, 1, 1)
    assert report.rejected["c.png"] == "5 x 5"


def test_at_most_a_hundred_rejections_are_listed_but_all_are_counted() -> None:
    funnel = Funnel(500)
    for number in range(300):
        funnel.reject(f"{number}.png", Fate.UNREADABLE, "cut short")
    report = funnel.report()
    assert len(report.rejected) == 100
    assert (report.unreadable, report.kept) == (300, 200)


def test_an_empty_result_is_refused_with_the_funnel_and_the_first_reason() -> None:
    funnel = Funnel(3)
    funnel.reject("a.png", Fate.UNREADABLE, "cut short")
    funnel.reject("b.png", Fate.TOO_SMALL, "4 x 4")
    funnel.reject("c.png", Fate.TOO_SMALL, "5 x 5")
    with pytest.raises(DataError, match=r"0 of 3 files .*1 unreadable, 2 too small.*a\.png: cut short.*maxUpscale"):
        refuse_empty(funnel.report(), "png, jpg")


def test_an_empty_source_is_refused_with_the_kinds_of_file_looked_for() -> None:
    with pytest.raises(DataError, match=r"spec\.data\.sources has 0 files .* png, jpg"):
        refuse_empty(Funnel(0).report(), "png, jpg")
