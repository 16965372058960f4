"""Steps that should not count: found where they are, and nowhere else."""

import json
import math

import numpy as np
import pytest

from genemodel.train.guard import LARGEST, NEEDED, REMEMBERED, Guard

# Total losses × 100 of every step of a run on 600 generated cells, about nine cells a micro-batch:
# as noisy as a curve gets.
RECORDED = """
    898 903 885 900 927 931 877 915 910 886 859 903 922 889 886 871 879 912 907 911 888 881 926
    918 915 875 895 885 892 862 891 882 886 872 904 911 909 904 896 890 897 876 930 898 911 903
    880 901 879 865 894 888 883 884 900 883 891 915 879 903 880 907 868 888 879 887 896 884 897
    925 883 925 913 874 889 898 893 870 889 912 868 856 868 934 864 879 877 901 892 863 865 888
    882 879 908 876 878 912 869 872 899 893 862 887 887 887 905 901 907 901 862 885 901 833 901
    895 914 904 894 888 878 911 900 854 864 898 886 864 870 859 888 924 882 867 868 886 870 858
    905 865 884 857 871 875 874 894 879 898 895 859 898 875 925 882 854 888 895 876 882 850 884
    910 899 903 909 906 887 892 879 892 902 886 877 888 910 890 894 893 876 884 887 869 851 871
    892 865 887 898 891 896 875 891 881 872 875 871 869 885 893 878 876 858 894 905 901 891 876
    877 896 889 888 881 872 898 864 885 888 881 895 913 878 884 890 904 885 902 885 867 888 889
    883 899 886 879 862 882 921 862 866 882 892 890 881 907 891 900 880 862 904 915
"""


def recorded():
    return [int(word) / 100 for word in RECORDED.split()]


def generated(seed, n=3000):
    """Decay as of a real run, with noise that has heavy tails and a memory."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_t(8, n) * 0.02
    for i in range(1, n):
        noise[i] += 0.5 * noise[i - 1]
    step = np.arange(n)
    return (3.0 + 6.0 * np.exp(-step / 200) + 2.0 / np.sqrt(1 + step)) * (1 + noise)


def judged(guard, totals):
    """Steps at which something was found wrong."""
    return [i for i, x in enumerate(totals) if guard.judge({"a": x}, 1.0, float(x))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LARGEST])
def test_what_is_not_finite_is_named(bad):
    guard = Guard(0)
    good = {"masked_gene": 5.0, "masked_value": 0.3}
    assert guard.judge(good, 1.0, 5.3) == ""
    assert guard.judge({**good, "masked_value": bad}, 1.0, bad) == "masked_value not finite"
    assert guard.judge(good, bad, 5.3) == "gradient norm not finite"
    both = guard.judge({"masked_gene": bad, "masked_value": 0.3}, math.nan, bad)
    assert both == "masked_gene, gradient norm not finite"
    # What was refused is not remembered.
    assert guard.state() == {"recent": [5.3]}


def test_an_ordinary_curve_raises_no_alarm():
    assert judged(Guard(12.0), recorded()) == []
    for seed in range(10):
        assert judged(Guard(12.0), generated(seed)) == []


@pytest.mark.parametrize("at", [NEEDED, 120, 249])
def test_a_jump_is_found_in_a_recorded_curve(at):
    totals = recorded()
    totals[at] *= 1.5
    guard = Guard(12.0)
    assert judged(guard, totals) == [at]
    # Downwards is no jump, and early on nobody knows what is usual.
    totals = recorded()
    totals[at] *= 0.3
    totals[NEEDED - 1] *= 3
    assert judged(Guard(12.0), totals) == []


def test_a_jump_is_found_while_the_loss_still_falls():
    for seed in range(5):
        totals = generated(seed)
        totals[[300, 2000]] *= 2.0
        assert judged(Guard(12.0), totals) == [300, 2000]


def test_the_message_gives_loss_and_level():
    guard = Guard(12.0)
    assert judged(guard, [2.0] * NEEDED) == []
    # Even where no loss differed from another, rounding is no jump.
    assert guard.judge({"a": 2.001}, 1.0, 2.001) == ""
    said = guard.judge({"a": 4.0}, 1.0, 4.0)
    assert said == "the loss 4 is 500 deviations above the recent 2"
    assert judged(Guard(0), [2.0] * NEEDED + [400.0]) == []


def test_a_new_level_that_is_accepted_becomes_the_usual_one():
    guard = Guard(12.0)
    judged(guard, recorded())
    noise = np.random.default_rng(0).normal(0, 0.2, REMEMBERED)
    found = 0
    for total in (20.0 + noise).tolist():
        if guard.judge({"a": total}, 1.0, total):
            found += 1
            guard.accept(total)
    assert 0 < found <= NEEDED
    assert guard.judge({"a": 20.5}, 1.0, 20.5) == ""


def test_a_resumed_guard_judges_as_the_one_before():
    totals = [*recorded(), *recorded()]
    totals[333] *= 1.5
    whole = Guard(12.0)
    assert judged(whole, totals) == [333]
    for cut in (10, 249, 333, 334):
        first = Guard(12.0)
        judged(first, totals[:cut])
        second = Guard(12.0)
        second.load(json.loads(json.dumps(first.state())))
        judged(second, totals[cut:])
        assert second.state() == whole.state()
