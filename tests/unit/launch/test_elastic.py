"""How many failures a run bears."""

from pathlib import Path

from finray.training.common.storage import Folder
from finray.training.launch.elastic import Patience
from finray.training.records import checkpoint


def test_only_failures_without_progress_count(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "checkpoints"))

    def save(step: int) -> None:
        staged = tmp_path / str(step)
        staged.mkdir()
        manifest = checkpoint.make_manifest(staged, 0, 1, {})
        checkpoint.publish(staged, folder / checkpoint.checkpoint_name(step), 0, manifest)

    patience = Patience(folder, 2)
    assert [patience.bears() for _ in range(3)] == [True, True, False]
    patience = Patience(folder, 2)
    assert patience.bears() and patience.bears()
    save(10)
    assert patience.bears() and patience.bears()
    save(20)
    assert [patience.bears() for _ in range(3)] == [True, True, False]
    assert not Patience(folder, 0).bears()
