"""File systems without `flock` (Lustre as it is often mounted) cost a warning, not the run."""

import errno
import fcntl
import logging

from corpora import encode, picture, write_llava

from laver_mcore.data.order import index as index_module
from laver_mcore.data.order.index import FOLDER, get_index
from laver_mcore.data.records.sources import open_source


def test_a_set_is_measured_and_kept_all_the_same(tmp_path, hugging_face, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(index_module, "_CACHED_FROM", 5)
    corpus = write_llava(tmp_path, {f"{n}.jpg": encode(picture(20 + n, 30, seed=n)) for n in range(8)})
    with caplog.at_level(logging.WARNING):
        index = get_index(open_source(corpus, corpus.parent), hugging_face, "", folder=corpus.parent / FOLDER)
    assert len(index) == 10
    assert index.folder is not None
    assert "cannot be locked here (Function not implemented)" in caplog.text
