"""A tensor's storage is emptied and filled again, and whoever has a view of it notices nothing."""

import torch

from learner.parking import Parking


def test_views_of_a_parked_storage_are_what_they_were():
    flat = torch.arange(12.0)
    view = flat[4:8].view(2, 2)
    parking = Parking("cpu")
    parking.park([flat])
    assert parking.parked and flat.untyped_storage().nbytes() == 0
    assert torch.equal(parking.present(flat), torch.arange(12.0)), "its numbers are there all the while"
    parking.unpark()
    assert not parking.parked and torch.equal(flat, torch.arange(12.0))
    view += 1
    assert flat[4:8].tolist() == [5, 6, 7, 8], "it is still a view"


def test_a_storage_is_parked_once_however_many_tensors_share_it():
    flat = torch.arange(6.0)
    parking = Parking("cpu")
    parking.park([flat[:3], flat[3:]])
    assert torch.equal(parking.present(flat), torch.arange(6.0))
    parking.unpark()
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_dropped_comes_back_as_zeros():
    kept, dropped = torch.ones(3), torch.ones(5)
    parking = Parking("cpu")
    parking.park([kept], [dropped])
    parking.unpark()
    assert kept.tolist() == [1] * 3 and dropped.tolist() == [0] * 5


def test_what_changed_meanwhile_is_parked_anew():
    tensor = torch.ones(3)
    parking = Parking("cpu")
    for value in (1.0, 2.0):
        tensor.fill_(value)
        parking.park([tensor])
        parking.unpark()
        assert tensor.tolist() == [value] * 3


def test_a_tensor_of_another_device_stays():
    tensor = torch.ones(3)
    parking = Parking("meta")
    parking.park([tensor])
    assert not parking.parked and parking.present(tensor) is tensor and tensor.sum() == 3
