"What is said of paired differences, against numbers from tables and from paper."
import math
import numpy as np
import pytest
from fastai_selfattn.compare.intervals import Differences, paired

# t for 95 %, two-sided, by degrees of freedom, as in any table
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}

@pytest.mark.parametrize('df', T)
def test_half_width_is_t_times_the_standard_error(df):
    gains = np.random.default_rng(df).standard_normal(df+1)
    d = Differences(tuple(gains))
    by_hand = T[df]*math.sqrt(sum((g-sum(gains)/(df+1))**2 for g in gains)/df)/math.sqrt(df+1)
    assert d.half == pytest.approx(by_hand, rel=3e-4)
    assert (d.low, d.high) == pytest.approx((d.mean-d.half, d.mean+d.half))

def test_by_hand():
    "Mean 3, deviations -2 -1 0 3, so sd is the root of 14/3; the interval is 3 -+ 3.182*sd/2"
    d = paired([11, 22, 33, 46], [10, 20, 30, 40])
    assert (d.n, d.mean, d.wins, d.sign) == (4, 3, 4, 0)
    assert d.low == pytest.approx(3-3.1824*math.sqrt(14/3)/2, abs=1e-3)

def test_pairs_not_groups():
    "Seeds that differ by far more than the arms do not widen the interval"
    d = paired([1.1, 10.2, 100.1, 50.2], [1, 10, 100, 50])
    assert d.sign == 1 and d.half < .1

def test_direction():
    assert paired([1, 2], [3, 7]).gains == (-2, -5)
    assert paired([1, 2], [3, 7], lower_is_better=True).gains == (2, 5)
    assert paired([1, 2, 5], [2, 1, 5]).wins == 1     # a tie is no win

@pytest.mark.parametrize('gains,sign', [((1, 2, 3, 4), 1), ((-1, -2, -3, -4), -1), ((1, -1, 2), 0), ((5,), 0), ((), 0), ((0, 0, 0), 0), ((.1, .1, .1+1e-12), 0)])
def test_sign(gains, sign): assert Differences(gains).sign == sign

# Cohen's d that a paired t test at 5 % shows with 80 % power, by the number of pairs (tables of power)
D = {5: 1.682, 10: .996, 20: .660, 34: .495}

@pytest.mark.parametrize('n', D)
def test_detectable(n):
    gains = np.random.default_rng(n).standard_normal(n)
    assert Differences(tuple(gains)).detectable == pytest.approx(D[n]*gains.std(ddof=1), rel=2e-3)

def test_two_seeds_detect_only_what_is_huge():
    d = Differences((1., 2.))
    assert d.detectable > d.half > 6

def test_one_seed_has_no_interval():
    d = Differences((1.,))
    assert math.isnan(d.half) and math.isnan(d.sd) and math.isnan(d.detectable) and d.mean == 1

def test_unequal_numbers():
    with pytest.raises(ValueError, match='got 3 and 2'): paired([1, 2, 3], [1, 2])
