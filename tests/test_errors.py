from rlhf_jax.errors import listed


def test_of_a_long_list_the_rest_is_counted():
    assert listed([]) == ""
    assert listed("abcde") == "a, b, c, d, e"
    assert listed(iter("abcdefg")) == "a, b, c, d, e and 2 more"
    assert listed("abc", "; ", most=2) == "a; b and 1 more"
