import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from atelier_runtime.data import scan as scan_module
from atelier_runtime.data.scan import CaptionText, ClipRule, Probe, ScanMemory, SoundRule, probe, read_caption
from atelier_runtime.data.source import FileFacts
from tiny_data import grey_frames, picture, tone, write_clip, write_tone, write_truncated_picture


def facts(path: Path) -> FileFacts:
    return FileFacts.of(str(path))


def test_a_picture_gives_its_upright_size_and_content_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = picture(8, 8).getexif()
    exif[0x0112] = 6
    picture(40, 20).save(path, exif=exif)
    assert probe(facts(path), None) == Probe(hashlib.sha256(path.read_bytes()).hexdigest(), 20, 40, 1, "")


def test_a_clip_gives_its_size_and_the_frames_it_has_at_the_rate(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", grey_frames([100] * 25), 25)
    seen = probe(facts(path), ClipRule(49, 16))
    assert (seen.width, seen.height, seen.frames, seen.reason) == (64, 48, 16, "")
    assert probe(facts(path), ClipRule(5, 16)).frames == 5


def test_damage_is_told_with_a_reason_and_never_raised(tmp_path: Path) -> None:
    write_truncated_picture(tmp_path / "cut.png")
    cut = probe(facts(tmp_path / "cut.png"), None)
    assert cut.reason
    assert cut.content
    text = tmp_path / "text.mp4"
    text.write_text("no clip")
    assert probe(facts(text), ClipRule(5, 8)).reason
    gone = probe(FileFacts(str(tmp_path / "gone.png"), 1, 1), None)
    assert (gone.content, gone.reason) == ("", "No such file or directory")


def test_captions_may_start_with_a_byte_order_mark_and_must_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffein Käfer\n".encode())
    assert read_caption(facts(path)) == CaptionText("ein Käfer\n", "")
    path.write_bytes("ein Käfer".encode("latin-1"))
    assert read_caption(facts(path)) == CaptionText(None, "its caption a.txt is not UTF-8")
    path.unlink()
    assert "cannot be read" in read_caption(FileFacts(str(path), 1, 1)).reason
    lyrics = tmp_path / "a.lyrics.txt"
    lyrics.write_bytes("Käfer".encode("latin-1"))
    assert read_caption(facts(lyrics), "lyrics") == CaptionText(None, "its lyrics a.lyrics.txt is not UTF-8")


def test_a_sound_gives_the_samples_that_it_has_at_the_rate_up_to_what_is_used(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.wav", tone(1.5, 8000, 440), 8000)
    rule = SoundRule.of_seconds(4000, 100, least=1, most=60, step=10)
    seen = probe(facts(path), rule)
    assert (seen.width, seen.height, seen.frames, seen.reason) == (1, 1, 6000, "")
    assert probe(facts(path), replace(rule, most=4000)).frames == 4000
    path.write_text("no sound")
    assert probe(facts(path), rule).reason


def test_lengths_of_sounds_are_whole_units() -> None:
    rule = SoundRule.of_seconds(44_100, 1920, least=1, most=2, step=3)
    assert (rule.least, rule.most, rule.step) == (22 * 1920, 45 * 1920, 69 * 1920)


@pytest.fixture
def seen(tmp_path: Path) -> dict[FileFacts, Probe]:
    for number in range(3):
        picture(20 + number, 20).save(tmp_path / f"{number}.png")
    files = [facts(tmp_path / f"{number}.png") for number in range(3)]
    return {file: probe(file, None) for file in files}


def test_what_was_seen_is_remembered_until_the_file_changes(tmp_path: Path, seen: dict[FileFacts, Probe]) -> None:
    caption = FileFacts("a.txt", 5, 7)
    ScanMemory(tmp_path / "cache", "uri", None).replace(seen, {caption: CaptionText("a cat", "")})
    memory = ScanMemory(tmp_path / "cache", "uri", None)
    for file, value in seen.items():
        assert memory.probe_of(file) == value
        assert memory.probe_of(FileFacts(file.path, file.size, file.mtime_ns + 1)) is None
        assert memory.probe_of(FileFacts(file.path, file.size + 1, file.mtime_ns)) is None
    assert memory.caption_of(caption) == CaptionText("a cat", "")


def test_damaged_files_are_remembered_but_unreachable_ones_looked_at_again(tmp_path: Path) -> None:
    write_truncated_picture(tmp_path / "cut.png")
    cut, gone = facts(tmp_path / "cut.png"), FileFacts(str(tmp_path / "gone.png"), -1, 0)
    ScanMemory(tmp_path / "cache", "uri", None).replace({cut: probe(cut, None), gone: probe(gone, None)}, {})
    memory = ScanMemory(tmp_path / "cache", "uri", None)
    assert memory.probe_of(cut) is not None
    assert memory.probe_of(gone) is None


def test_sources_and_kinds_of_look_are_remembered_apart(tmp_path: Path, seen: dict[FileFacts, Probe]) -> None:
    ScanMemory(tmp_path / "cache", "uri", ClipRule(5, 8)).replace(seen, {})
    file = next(iter(seen))
    assert ScanMemory(tmp_path / "cache", "uri", ClipRule(5, 8)).probe_of(file) is not None
    assert ScanMemory(tmp_path / "cache", "uri", ClipRule(9, 8)).probe_of(file) is None
    assert ScanMemory(tmp_path / "cache", "uri", ClipRule(5, 16)).probe_of(file) is None
    assert ScanMemory(tmp_path / "cache", "other", ClipRule(5, 8)).probe_of(file) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 0}', '{"version": 2, "probes": [{}, {}], "captions": [{}, {}]}']
)
def test_a_damaged_memory_is_forgotten(tmp_path: Path, seen: dict[FileFacts, Probe], content: str) -> None:
    ScanMemory(tmp_path / "cache", "uri", None).replace(seen, {})
    [path] = (tmp_path / "cache" / "scans").iterdir()
    path.write_text(content)
    memory = ScanMemory(tmp_path / "cache", "uri", None)
    assert memory.probe_of(next(iter(seen))) is None
    memory.replace(seen, {})
    assert ScanMemory(tmp_path / "cache", "uri", None).probe_of(next(iter(seen))) is not None


def test_an_unchanged_memory_is_not_written_again(
    tmp_path: Path, seen: dict[FileFacts, Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    ScanMemory(tmp_path / "cache", "uri", None).replace(seen, {})
    written = []
    monkeypatch.setattr(scan_module, "replace_file", lambda path, content: written.append(path))
    ScanMemory(tmp_path / "cache", "uri", None).replace(dict(seen), {})
    assert written == []
    ScanMemory(tmp_path / "cache", "uri", None).replace({}, {})
    assert len(written) == 1
