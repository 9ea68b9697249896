"""What the statistics promise: intervals that cover 95 %, tests that find 5 % in nothing, metrics that agree with SciPy, scikit-learn and slow counts.

`python tests/test_statistics.py` prints the tables of coverage and of false findings that the notebooks quote (half an hour on one thread).
"""
import sys

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy import stats
from scipy.stats import binom, norm

from anatcxr.downstream import intervals as ivl
from anatcxr.downstream.intervals import auc_covariance, bootstrap_ci, delong_ci, paired_ci, two_level_ci, wilson_ci
from anatcxr.downstream.metrics import (MetricError, accuracy, auroc, auroc_columns, average_precision, calibration_error, choose_threshold, confusion_at,
                                        mask_scores, mean_auroc, one_vs_rest, per_class, top_confusion)
from anatcxr.downstream.significance import (RunSummary, adjust_p, delong_test, delong_unpaired, mcnemar_test, not_significantly_different,
                                             permutation_test, t_test)

STUDIES = 2000  # which leaves a share of .95 uncertain by .005 (one standard error)


# Studies whose truth is known

def patients_of(r, G, most):
    "The patient of each row: 1 to `most` images each, and a label for each patient."
    sick = np.zeros(G, bool)
    while not 1 < sick.sum() < G - 1: sick = r.random(G) < .4
    who = np.repeat(np.arange(G), r.integers(1, most + 1, G))
    return who, sick[who].astype(int)


def noise(r, who, alike):
    "Unit variance, of which the share `alike` is the patient's."
    return np.sqrt(alike) * r.normal(size=who.max() + 1)[who] + np.sqrt(1 - alike) * r.normal(size=len(who))


def one_model(seed, G, auc, most=6, alike=.6):
    "Binormal scores of this area, images of a patient alike."
    r = np.random.default_rng([seed, G, most, round(1000 * auc)])
    who, y = patients_of(r, G, most)
    return who, y, np.sqrt(2) * norm.ppf(auc) * y + noise(r, who, alike)


def two_models(seed, G, auc=.8, better=0., most=6, alike=.6):
    "Two models that share half of their noise; areas differ by `better`."
    r = np.random.default_rng([seed, G, most, 77])
    who, y = patients_of(r, G, most)
    shared = noise(r, who, alike)
    own = lambda auc: np.sqrt(2) * norm.ppf(auc) * y + np.sqrt(.5) * shared + np.sqrt(.5) * noise(r, who, alike)
    return who, y, own(auc), own(auc + better)


def runs_of(seed, G, S, spread, auc=.8):
    "S training runs whose separation varies by `spread`; one image for each patient."
    r = np.random.default_rng([seed, G, S, round(100 * spread)])
    who, y = patients_of(r, G, 1)
    shared = r.normal(size=G)
    d = np.sqrt(2) * norm.ppf(auc) + spread * r.normal(size=S)
    return who, y, d[:, None] * y + np.sqrt(.5) * (shared + r.normal(size=(S, G)))


def mean_of_runs(spread, auc=.8):
    "The area of `runs_of` averaged over all runs there could be."
    z = np.linspace(-8, 8, 4001)
    return np.average(norm.cdf(norm.ppf(auc) + spread * z / np.sqrt(2)), weights=norm.pdf(z))


def covered(cis, truth):
    "Shares of intervals that hold the truth, lie above it, lie below it; an absent interval holds nothing."
    ends = np.array([ci.ends for ci in cis])
    return ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean(), (ends[:, 0] > truth).mean(), (ends[:, 1] < truth).mean()


def both_bootstraps(fn, groups, *arrays, seed, n):
    "Percentile and BCa from one set of draws."
    parts = ivl._stretches(groups, arrays)
    draws, left_out = ivl._replicates([fn], *parts, n=n, seed=seed)[0], ivl._jackknife(fn, *parts)
    return [ivl._interval(fn(*parts[0]), draws, left_out, .95, m, len(parts[3])) for m in ("percentile", "bca")]


def test_both_bootstraps_are_the_public_ones():
    who, y, s = one_model(0, 30, .8)
    pair = both_bootstraps(auroc, who, y, s, seed=3, n=200)
    assert pair == [bootstrap_ci(auroc, who, y, s, seed=3, n=200, method=m) for m in ("percentile", "bca")]


# Coverage

def area_coverage(G, auc, most, studies=STUDIES, n=1000, rest=True):
    found = {}
    for seed in range(studies):
        who, y, s = one_model(seed, G, auc, most)
        res = dict(zip(("percentile", "BCa"), both_bootstraps(auroc, who, y, s, seed=seed, n=n)))
        res["DeLong"] = delong_ci(y, s, who)
        if rest: res["DeLong, identity"] = delong_ci(y, s, who, scale="identity")
        if rest and most > 1 and G == 80:
            res |= {"percentile, by image": bootstrap_ci(auroc, np.arange(len(y)), y, s, seed=seed, n=n), "DeLong, by image": delong_ci(y, s)}
        for k, ci in res.items(): found.setdefault(k, []).append(ci)
    return {k: covered(v, auc) for k, v in found.items()}


def test_intervals_of_an_area_cover_by_patient_and_not_by_image():
    "80 patients with 1 to 4 images each."
    got = {k: v[0] for k, v in area_coverage(80, .8, 4, n=300, rest=False).items()}
    assert .93 <= got["BCa"] <= .97 and .93 <= got["DeLong"] <= .97, got
    naive = [one_model(seed, 80, .8, 4) for seed in range(500)]
    by_image = covered([delong_ci(y, s) for _, y, s in naive], .8)[0]
    drawn = covered([bootstrap_ci(auroc, np.arange(len(y)), y, s, n=200, seed=k) for k, (_, y, s) in enumerate(naive)], .8)[0]
    assert by_image < .87 and drawn < .87, (by_image, drawn)


def test_intervals_fail_near_one_with_few_patients():
    "Known and documented: 20 patients, area .95. Should one of these begin to cover, the documentation is out of date."
    got = {k: v[0] for k, v in area_coverage(20, .95, 6, studies=500, n=200).items()}
    assert got["percentile"] < .87 and got["DeLong, identity"] < .85 and got["BCa"] < .93, got


def mean(x): return float(np.mean(x))
mean.weighted = lambda w, x: w @ x / w.sum(1)  # noqa: E305


def mean_coverage(G, studies=STUDIES, n=1000):
    found = {"percentile": [], "BCa": [], "percentile, by image": []}
    for seed in range(studies):
        r = np.random.default_rng([seed, G, 5])
        who = np.repeat(np.arange(G), r.integers(1, 7, G))
        x = noise(r, who, .6)
        for k, ci in zip(found, both_bootstraps(mean, who, x, seed=seed, n=n)): found[k].append(ci)
        if seed < 500: found["percentile, by image"].append(bootstrap_ci(mean, np.arange(len(x)), x, seed=seed, n=n))
    return {k: covered(v, 0) for k, v in found.items()}


def test_intervals_of_a_mean_cover_by_patient_and_not_by_image():
    got = {k: v[0] for k, v in mean_coverage(60, n=250).items()}
    assert .93 <= got["percentile"] <= .97 and .93 <= got["BCa"] <= .97 and got["percentile, by image"] < .85, got


def difference_coverage(G, most, studies=STUDIES, n=1000):
    found = {"percentile": [], "DeLong": []}
    for seed in range(studies):
        who, y, a, b = two_models(seed, G, .75, .05, most=most)
        found["percentile"].append(paired_ci(auroc, who, y, a, b, seed=seed, n=n).difference)
        d = delong_test(y, a, b, who)
        found["DeLong"].append(ivl.Interval(d.difference, d.low, d.high, .95, G, 0))
    return {k: covered(v, .05) for k, v in found.items()}


def test_intervals_of_a_paired_difference_cover():
    got = {k: v[0] for k, v in difference_coverage(120, 2, n=200).items()}
    assert .93 <= got["DeLong"] <= .97 and .93 <= got["percentile"] <= .97, got


def wilson_coverage(n, p):
    "Exact, by summing over all counts."
    ends = np.array([wilson_ci(k, n).ends for k in range(n + 1)])
    return binom.pmf(np.arange(n + 1), n, p) @ ((ends[:, 0] <= p) & (p <= ends[:, 1]))


def test_wilson_covers():
    "Exactly computed. Coverage of any interval of a count jumps with p; its mean over p is what 95 % means."
    p = np.linspace(.05, .95, 91)
    for n in (20, 100, 624):
        got = np.array([wilson_coverage(n, q) for q in p])
        assert .945 <= got.mean() <= .96 and got.min() > .91, (n, got.mean(), got.min())


def run_coverage(G, S, spread, studies=STUDIES, n=400):
    found, truth = {"two-level t": [], "two-level bootstrap": [], "t over runs": [], "patients, one run": []}, mean_of_runs(spread)
    for seed in range(studies):
        who, y, runs = runs_of(seed, G, S, spread)
        for k, m in (("two-level t", "t"), ("two-level bootstrap", "bootstrap")):
            found[k].append(two_level_ci(auroc, who, y, runs, n=n, seed=seed, method=m))
        each = RunSummary.of([auroc(y, s) for s in runs])
        half = stats.t.ppf(.975, S - 1) * each.sd / S ** .5
        found["t over runs"].append(ivl.Interval(each.mean, each.mean - half, each.mean + half, .95, G, 0))
        found["patients, one run"].append(delong_ci(y, runs[0]))
    return {k: covered(v, truth) for k, v in found.items()}


def test_interval_over_runs_and_patients_covers():
    "Four runs, 100 patients: both matter."
    cis, runs_only, truth = [], [], mean_of_runs(.2)
    for seed in range(STUDIES):
        who, y, runs = runs_of(seed, 100, 4, .2)
        cis.append(two_level_ci(auroc, who, y, runs, n=100, seed=seed))
        each = RunSummary.of([auroc(y, s) for s in runs])
        half = stats.t.ppf(.975, 3) * each.sd / 2
        runs_only.append(abs(each.mean - truth) <= half)
    got = covered(cis, truth)[0]
    assert .93 <= got <= .97 and np.mean(runs_only) < .92, (got, np.mean(runs_only))


# False findings

def paired_findings(G, most, studies=STUDIES, n=99):
    "Shares of p <= .05 where both models are equally good in the population."
    found = []
    for seed in range(studies):
        who, y, a, b = two_models(seed, G, most=most)
        cut = norm.ppf(.8) / np.sqrt(2)
        calls = [(s > cut).astype(int) for s in (a, b)]
        images = delong_test(y, a, b).p
        found.append([images, images if most == 1 else delong_test(y, a, b, who).p, permutation_test(auroc, who, y, a, b, n=n, seed=seed).p,
                      mcnemar_test(y, *calls).p, mcnemar_test(y, *calls, mid_p=True).p, permutation_test(accuracy, who, y, *calls, n=n, seed=seed).p])
    names = ("DeLong", "DeLong by patients", "permutation, area", "McNemar", "McNemar, mid-p", "permutation, accuracy")
    return dict(zip(names, (np.array(found) <= .05).mean(0)))


def fine(share): return .035 <= share <= .065


def test_paired_tests_keep_five_per_cent_on_independent_images():
    got = paired_findings(100, 1)
    assert all(fine(got[k]) for k in ("DeLong", "permutation, area", "McNemar, mid-p")), got
    assert got["McNemar"] < .05 and got["permutation, accuracy"] < .06, got  # few counts: exact tests stay below


def test_paired_tests_keep_five_per_cent_by_patients_and_not_by_images():
    got = paired_findings(60, 5)
    assert fine(got["DeLong by patients"]) and fine(got["permutation, area"]) and got["permutation, accuracy"] < .06, got
    assert got["DeLong"] > .12 and got["McNemar"] > .08, got


def test_unpaired_test_keeps_five_per_cent():
    p = []
    for seed in range(STUDIES):
        (_, y, a), (_, z, b) = one_model(seed, 80, .8, 1), one_model(seed, 120, .8, 1)
        p.append(delong_unpaired(y, a, z, b).p)
    assert fine(np.mean(np.array(p) <= .05))


def test_t_tests_keep_five_per_cent_and_students_fails_where_variances_and_numbers_differ():
    r = np.random.default_rng(0)
    equal, unequal = r.normal(size=(STUDIES, 2, 5)), [(3 * r.normal(size=3), r.normal(size=10)) for _ in range(STUDIES)]
    share = lambda studies, **kw: np.mean([t_test(a, b, **kw).p <= .05 for a, b in studies])
    assert fine(share(equal)) and fine(share([(3 * r.normal(size=8), r.normal(size=12)) for _ in range(STUDIES)], equal_var=False))
    assert share(unequal) > .15


def test_holm_keeps_five_per_cent_over_a_table_and_no_correction_does_not():
    p = np.random.default_rng(1).random((STUDIES, 8))
    assert fine(np.mean([adjust_p(row).min() <= .05 for row in p])) and np.mean(p.min(1) <= .05) > .3


# Against SciPy, scikit-learn and slow counts

def cases(n=100):
    for seed in range(n):
        r = np.random.default_rng(seed)
        N, levels = int(r.integers(6, 120)), int(r.choice([2, 5, 30, 10 ** 6]))
        y = r.integers(0, 2, N)
        y[:2] = 0, 1
        yield r, y, (r.integers(0, levels, N) + levels * .2 * y * r.random(N)).round() / levels


def wins(y, s): return (s[y == 1][:, None] > s[y == 0]) + .5 * (s[y == 1][:, None] == s[y == 0])  # (m,n)


def close(a, b): np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_areas_and_precision_agree_with_pairs_scikit_learn_and_scipy():
    for _, y, s in cases():
        close(auroc(y, s), wins(y, s).mean())
        close(auroc(y, s), sk.roc_auc_score(y, s))
        close(auroc(y, s), stats.mannwhitneyu(s[y == 1], s[y == 0]).statistic / (y.sum() * (1 - y).sum()))
        close(average_precision(y, s), sk.average_precision_score(y, s))
        close(average_precision(y, s), slow_precision(y, s))


def slow_precision(y, s):
    total, before = 0., 0
    for cut in sorted(set(s), reverse=True):
        tp, called = (y * (s >= cut)).sum(), (s >= cut).sum()
        total, before = total + (tp - before) / y.sum() * tp / called, tp
    return total


def test_weighted_functions_are_the_functions_on_repeated_rows():
    for r, y, s in cases(40):
        w = r.integers(0, 3, (20, len(y)))
        Y = np.stack([y, 1 - y, y], 1).astype(float)
        Y[r.random(Y.shape) < .2] = np.nan
        S, calls = np.stack([s, s ** 2, -s], 1), (s > np.median(s)).astype(int)
        for fn, a, b in ((auroc, y, s), (auroc_columns, Y, S), (mean_auroc, Y, S), (accuracy, y, calls)):
            close(fn.weighted(w.astype(float), a, b), [fn(np.repeat(a, k, 0), np.repeat(b, k, 0)) for k in w])


def test_delong_is_the_variance_of_placements():
    for r, y, s in cases():
        if min(y.sum(), (1 - y).sum()) < 2: continue
        other = s + r.normal(size=len(y)).round(1)
        v = [np.stack([wins(y, x).mean(k) for x in (s, other)]) for k in (1, 0)]
        auc, cov = auc_covariance(y, [s, other])
        close(cov, sum(np.cov(x) / x.shape[1] for x in v))
        close(auc, [auroc(y, s), auroc(y, other)])
        got, (d, var) = delong_test(y, s, other), (auc[1] - auc[0], cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
        if var > 1e-12: close([got.statistic, got.p], [d / var ** .5, 2 * norm.sf(abs(d) / var ** .5)])


def test_delong_is_fast():
    "A million images: N log N, where pairs would be 2.5e11."
    r = np.random.default_rng(0)
    y = r.random(10 ** 6) < .5
    ci = delong_ci(y, r.normal(size=10 ** 6) + y)
    assert abs(ci.value - norm.cdf(1 / np.sqrt(2))) < .002 and 0 < ci.high - ci.low < .0025


def test_bca_is_scipys_on_the_same_draws():
    from types import SimpleNamespace
    for r, y, s in cases(12):
        if min(y.sum(), (1 - y).sum()) < 2: continue
        parts = ivl._stretches(np.arange(len(y)), [y, s])
        draws = ivl._replicates([auroc], *parts, n=500, seed=1)[0]
        if np.isnan(draws).any(): continue
        own = SimpleNamespace(bootstrap_distribution=draws)
        want = stats.bootstrap((y, s), auroc, n_resamples=0, paired=True, vectorized=False, method="BCa", bootstrap_result=own)
        close(bootstrap_ci(auroc, np.arange(len(y)), y, s, n=500, seed=1, method="bca").ends, [*want.confidence_interval])


def test_thresholds_and_f1_agree_with_scikit_learn():
    for _, y, s in cases(25):
        best = max(sk.accuracy_score(y, s >= c) for c in [np.inf, *s])
        oracle = confusion_at(y, s, "oracle_acc")
        close(oracle.accuracy, best)
        assert oracle.threshold.source == "oracle" and confusion_at(y, s, choose_threshold(y, s)).threshold.source == "val"
        at = confusion_at(y, s, float(np.median(s)))
        for k, name in (("positive", "binary"), ("macro", "macro"), ("weighted", "weighted")):
            want = sk.f1_score(y, s >= np.median(s), average=name, zero_division=np.nan)
            if not np.isnan(at.f1(k)): close(at.f1(k), want)
        assert at.threshold.source == "fixed"


def test_classes_agree_with_scikit_learn():
    for r, y, _ in cases(30):
        labels = np.append([0, 1, 2], r.integers(0, 3, len(y)))
        p = r.dirichlet(np.ones(3), len(labels))
        close(per_class(one_vs_rest(labels, 3), p).mean, sk.roc_auc_score(labels, p, multi_class="ovr"))
        close(top_confusion(labels, p).counts, sk.confusion_matrix(labels, p.argmax(1)))


def test_masks_agree_with_scikit_learn():
    r = np.random.default_rng(0)
    pred, target = r.random((2, 20, 9, 9)) < .3
    got = mask_scores(pred, target)
    close(got.dice, [sk.f1_score(t.ravel(), p.ravel()) for p, t in zip(pred, target)])
    close(got.iou, [sk.jaccard_score(t.ravel(), p.ravel()) for p, t in zip(pred, target)])
    close([got.pooled_dice, got.pooled_iou], [sk.f1_score(target.ravel(), pred.ravel()), sk.jaccard_score(target.ravel(), pred.ravel())])


def test_perfect_calibration_has_an_error_of_sampling_only():
    r = np.random.default_rng(0)
    p = r.random(10 ** 5)
    assert all(calibration_error(r.random(10 ** 5) < p, p, by=by) < .01 for by in ("width", "mass"))


def test_t_tests_are_scipys():
    r = np.random.default_rng(0)
    for equal in (True, False):
        for n in (2, 3, 10):
            a, b = r.normal(size=n), r.normal(1, 2, size=n + 1)
            for got in (t_test(a, b, equal), t_test(RunSummary.of(a), RunSummary.of(b), equal)):
                want = stats.ttest_ind(b, a, equal_var=equal)
                close([got.statistic, got.p, got.low, got.high], [want.statistic, want.pvalue, *want.confidence_interval()])


def test_permutation_over_all_swaps_is_the_enumeration():
    who, y, a, b = two_models(0, 7, most=3)
    got = permutation_test(auroc, who, y, a, b)
    d = []
    for k in range(2 ** 7):
        s = (k >> who) & 1 == 1
        d.append(abs(auroc(y, np.where(s, a, b)) - auroc(y, np.where(s, b, a))))
    close(got.p, np.mean(np.array(d) >= abs(got.difference) - 1e-12))


def test_the_papers_rule():
    "The best and those with p >= .05 against it; the number of runs decides."
    runs = {"a": RunSummary(.800, .01, 5), "b": RunSummary(.805, .01, 5), "c": RunSummary(.70, .01, 5), "d": RunSummary(.79, np.nan, 1)}
    got = not_significantly_different(runs)
    assert got.best.tolist() == [False, True, False, False] and got.same.tolist()[:3] == [True, True, False] and got.same.isna()["d"]
    close(got.p["a"], stats.ttest_ind_from_stats(.8, .01, 5, .805, .01, 5).pvalue)


@pytest.mark.parametrize("call", [lambda y, s: auroc(y, s), lambda y, s: average_precision(y, s), lambda y, s: delong_ci(y, s),
                                  lambda y, s: delong_test(y, s, s), lambda y, s: confusion_at(y, s, .5), lambda y, s: choose_threshold(y, s),
                                  lambda y, s: calibration_error(y, s), lambda y, s: per_class(y[:, None], s[:, None]),
                                  lambda y, s: bootstrap_ci(auroc, y, y, s), lambda y, s: permutation_test(auroc, y, y, s, s, n=9)])
def test_what_cannot_be_right_is_refused_everywhere(call):
    y, s = np.array([0, 1, 1, 0]), np.array([.1, .4, .3, .2])
    call(y, s)
    for bad_y, bad_s in ((y, np.array([.1, np.nan, .3, .2])), (y, np.array([.1, np.inf, .3, .2])), (y + 1, s), (y, s[:3])):
        with pytest.raises(MetricError): call(bad_y, bad_s)


if __name__ == "__main__":
    show = lambda head, row: print(f"{head:34}", "  ".join(f"{k} {v if np.isscalar(v) else v[0]:.3f}" for k, v in row.items()), flush=True)
    print("coverage of 95 % intervals,", STUDIES, "studies")
    for most in (1, 6):
        for G in (20, 40, 80, 200):
            for auc in (.7, .85, .95): show(f"area {auc}, {G} patients, 1-{most} images", area_coverage(G, auc, most))
    for G in (20, 60, 200): show(f"mean, {G} patients, 1-6 images", mean_coverage(G))
    for G, most in ((40, 1), (120, 2), (200, 6)): show(f"difference, {G} patients, 1-{most} images", difference_coverage(G, most))
    for S in (3, 5, 10):
        for G in (60, 400):
            for spread in (0., .1, .4): show(f"{S} runs, {G} patients, spread {spread}", run_coverage(G, S, spread))
    for n in (20, 100, 624): show(f"Wilson, n={n}", {f"p={p}": wilson_coverage(n, p) for p in (.01, .05, .1, .5, .8, .9, .99)})
    print("false findings at 5 %")
    for G, most in ((20, 1), (60, 1), (200, 1), (20, 5), (60, 5), (200, 5)): show(f"{G} patients, 1-{most} images", paired_findings(G, most))
