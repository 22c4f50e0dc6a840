"""PyTorch's compile caches must not hand out code that was made with other sources of ours."""

import torch

from fx_passes import cache_key


def test_tag_is_set_within_and_restored():
    before = torch.compiler.config.cache_key_tag
    with cache_key.caches_keyed_by_sources():
        assert cache_key.sources_hash() in torch.compiler.config.cache_key_tag
        assert torch.compiler.config.cache_key_tag.startswith(before)
    assert torch.compiler.config.cache_key_tag == before


def test_hash_follows_every_source(tmp_path, monkeypatch):
    for package in ("fx_passes", "registrations", "scatter_ops/tuning/configs"):
        (tmp_path / package).mkdir(parents=True)
    files = [tmp_path / "registrations/mlp.py", tmp_path / "scatter_ops/tuning/configs/sm_90.json"]
    for file in files:
        file.write_text("1")
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "fx_passes/cache_key.py"))
    hashes = {cache_key.sources_hash.__wrapped__()}
    for file in files:
        file.write_text("2")
        hashes.add(cache_key.sources_hash.__wrapped__())
    assert len(hashes) == 3
