"""Where there is no terminal, as in a job's log, a long run still tells how far it is."""

from retrieval_jax.core import progress


def test_a_bar_without_a_terminal_writes_a_line_each_so_often(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    with progress.bar("train it", 10) as advance:
        advance(3, "loss 1.50")
        assert "3/10" in capsys.readouterr().err
        monkeypatch.setattr(progress, "LINE_EVERY", 1000)
        advance(4)
        assert not capsys.readouterr().err
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "7/10" in lines[0]
    assert "loss 1.50" in lines[0]
