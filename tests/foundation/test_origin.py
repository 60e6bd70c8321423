from dataclasses import replace

from crosscoder.foundation.origin import ModelOrigin, Reads, TokenOrigin


def test_a_published_dictionary_has_the_tokens_that_it_is_read_on():
    ours = Reads(
        model=ModelOrigin(name="m", weights="1234"),
        tokens=TokenOrigin(tokenizer="abcd", context=8),
        site="residual",
        sites=(1, 2),
    )
    other = replace(ours.tokens, special_ids=(7,))
    assert ours.on_tokens(other) == ours
    published = replace(ours, published="somebody's")
    assert published.on_tokens(other).tokens.special_ids == (7,)
    assert published.on_tokens(None) == published
