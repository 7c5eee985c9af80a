import itertools
import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.training import crc


def test_zeros():
    for count in 0, 1, 4, 1000:
        assert crc.of_zeros(count) == zlib.crc32(bytes(count))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=3),  # of each axis: parts, and length of one
    st.sampled_from(["int8", "float16", "float32"]),
    st.randoms(use_true_random=False),
)
def test_the_shares_of_all_shards_are_the_checksum_of_the_whole(axes, dtype, random):
    """In any order; and a byte that is another one in one of them gives another checksum."""
    shape = tuple(parts * length for parts, length in axes)
    array = np.array([random.randrange(1, 99) for _ in range(int(np.prod(shape)))], dtype).reshape(shape)
    places = itertools.product(*(range(parts) for parts, _ in axes))
    shards = []
    for place in places:
        index = tuple(slice(i * length, (i + 1) * length) for i, (_, length) in zip(place, axes, strict=True))
        shards.append((index, np.array(array[index])))
    random.shuffle(shards)

    def checksum():
        found = crc.of_zeros(array.nbytes)
        for shard in shards:
            found ^= crc.of_shards(shape, array.itemsize, [shard])
        return found

    assert checksum() == zlib.crc32(array.tobytes())
    index, values = shards[-1]
    values.reshape(-1)[0] += 1
    assert checksum() != zlib.crc32(array.tobytes())
