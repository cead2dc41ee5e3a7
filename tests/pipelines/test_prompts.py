"""Prompts are cleaned as by the originals. What is expected here was given by their own code."""

import pytest

from pab_kernels.pipelines.prompts import clean_prompt

TABLE = [
    ("  A &amp; B\n C ", "a b c"),
    ("A Cat aesthetic score: 6.5.", "a cat aesthetic score: 6.5."),
    ("", ""),
    ("see https://www.example.com/a?b=1 now", "see ?b=1 now"),
    ("mail me@mail.com or @nick", "mail me or"),
    ("a <b>bold</b> <person> &lt;i&gt; walk", "a bold person walk"),
    ("漢字 a 㐀 tree カ", "a tree カ"),
    ("this-is-my-cute-cat", "this is my cute cat"),
    ("a-b-c", "a-b-c"),
    ("“quoted” and \u2018single\u2019", "quoted\" and 'single"),
    ("'quoted'", "quoted"),
    ("page 12 of shot.png, 1.2.3.4 #12 #12345 123456", "of"),
    ("free shipping! download free, click for more", "!"),
    ("jc6640 jc6640vc 6640vc231 j2d1a2a 640x480 3.5\u00d72", ""),
    ("naïve ÃƒÂ© ½ cup", "naïve ãƒâ cup"),
    ("*** (a) [b] {c} | / \\ ~", "a b c"),
    ("one,two.three", "one, two. three"),
    ("a \u2014 b \u2013 c", "a - b - c"),
    ("%41+cat%20runs", "a cat runs"),
    (". . . .hidden", ". . hidden"),
]
"""Prompts, and what Open-Sora makes of them."""


@pytest.mark.parametrize(("prompt", "cleaned"), TABLE)
def test_open_sora_cleans_prompts(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize(("prompt", "cleaned"), TABLE)
def test_plan_has_the_same_rules(prompt, cleaned):
    assert clean_prompt(prompt, "open_sora_plan_v120") == cleaned


def test_plan_leaves_white_space_in_the_middle_of_its_rules():
    assert clean_prompt("( .a") == ""
    assert clean_prompt("( .a", "open_sora_plan_v110") == ". a"
