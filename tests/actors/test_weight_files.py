"""Weights as bytes, and the digest that shows they are the same."""

import torch

from actors.weight_files import WeightsDigest, digest_of, pack, unpack


def test_tensors_come_back_bit_by_bit():
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "c": torch.tensor(2.0)}
    found = unpack(pack(tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert digest_of([found]) == digest_of([tensors])


def test_the_digest_sees_names_values_types_and_shapes():
    tensor = torch.arange(4, dtype=torch.float32)
    others = [
        {"b": tensor},
        {"a": tensor + 1e-7},
        {"a": tensor.to(torch.float64)},
        {"a": tensor.view(2, 2)},
        {"a": tensor, "b": tensor},
    ]
    digests = {digest_of([bucket]) for bucket in ({"a": tensor}, *others)}
    assert len(digests) == 1 + len(others)


def test_the_digest_of_buckets_is_that_of_one_after_another():
    digest = WeightsDigest()
    digest.add({"a": torch.ones(2)})
    digest.add({"b": torch.zeros(2)})
    assert digest.hexdigest() == digest_of([{"a": torch.ones(2)}, {"b": torch.zeros(2)}])
