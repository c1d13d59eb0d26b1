def try_save(stage: Stage, folder: Path, trained_bytes: int, free: int) -> tuple[float, int]:
    """Seconds and bytes of a save: of the artefact, or where that is large, from a part of it."""
    check_room(stage, trained_bytes, free)
    start = time.perf_counter()
    try:
        if trained_bytes <= _MOST_WRITTEN:
            stage.save(folder)
            sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
            return time.perf_counter() - start, sum(sizes)
        with (folder / "probe").open("wb") as stream:
            stream.write(bytes(_PROBE))
            os.fsync(stream.fileno())
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise NoRoomError(_no_room(stage, stage.kept(trained_bytes), free)) from error
    return (time.perf_counter() - start) * trained_bytes / _PROBE, trained_bytes


def check_room(stage: Stage, artefact_bytes: int, free: int) -> None:
    needed = stage.kept(artefact_bytes)
    if needed > free:
        raise NoRoomError(_no_room(stage, needed, free))


def _no_room(stage: Stage, needed: int, free: int) -> str:
    return (
        f"{stage.folder}: the run will keep {needed / 2**20:.1f} MiB there (rehearsal of the save),"
        f" and its file system has {free / 2**20:.1f} MiB free; free some, or give a folder "
        "elsewhere with --out"
    )


@contextmanager
def scratch(run: Path) -> Iterator[Path]:
    folder = run / _SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
