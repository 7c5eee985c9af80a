from rlhf_jax.errors import listed, short


def test_of_a_long_list_the_rest_is_counted():
    assert listed([]) == ""
    assert listed("abcde") == "a, b, c, d, e"
    assert listed(iter("abcdefg")) == "a, b, c, d, e and 2 more"
    assert listed("abc", "; ", most=2) == "a; b and 1 more"


def test_a_long_value_is_cut():
    assert short("x" * 80) == "x" * 80
    assert short("x" * 81) == "x" * 77 + "..."
    assert short("abcdef", most=5) == "ab..."
