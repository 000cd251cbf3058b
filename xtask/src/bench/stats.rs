//! Medians, intervals and the random order, from one printed seed.

/// A small generator (splitmix64): the order of a run can be had again from its seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is small: the bias of the remainder does not matter.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % (n.max(1) as u64)).unwrap_or(0)
    }

    /// The numbers below `n` in random order.
    pub fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for k in (1..n).rev() {
            order.swap(k, self.below(k + 1));
        }
        order
    }
}

/// The value below which a share `q` of the sample lies, between neighbours by straight line. An empty sample gives NaN.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positions in a sample of thousands at most"
)]
pub fn quantile(sample: &[f64], q: f64) -> f64 {
    if sample.is_empty() {
        return f64::NAN;
    }
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// The middle of a sample.
pub fn median(sample: &[f64]) -> f64 {
    quantile(sample, 0.5)
}

/// How often a sample is drawn anew for an interval.
const DRAWS: usize = 2000;

/// A quantile with its 95 % interval by bootstrap (percentiles of the quantiles of [`DRAWS`] samples drawn with replacement).
pub fn interval(sample: &[f64], q: f64, random: &mut Random) -> Interval {
    let at = quantile(sample, q);
    if sample.len() < 3 {
        return Interval {
            at,
            low: f64::NEG_INFINITY,
            high: f64::INFINITY,
        };
    }
    let mut drawn = vec![0.0; sample.len()];
    let mut found = Vec::with_capacity(DRAWS);
    for _ in 0..DRAWS {
        for slot in &mut drawn {
            *slot = sample[random.below(sample.len())];
        }
        found.push(quantile(&drawn, q));
    }
    Interval {
        at,
        low: quantile(&found, 0.025),
        high: quantile(&found, 0.975),
    }
}

/// As [`interval`], for something that is made of both halves of all pairs; pairs stay together.
pub fn paired_interval(pairs: &[(f64, f64)], random: &mut Random, of: impl Fn(&[f64], &[f64]) -> f64) -> Interval {
    let (base, ours): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let at = of(&base, &ours);
    if pairs.len() < 3 {
        return Interval {
            at,
            low: f64::NEG_INFINITY,
            high: f64::INFINITY,
        };
    }
    let mut found = Vec::with_capacity(DRAWS);
    for _ in 0..DRAWS {
        let drawn = (0..pairs.len()).map(|_| pairs[random.below(pairs.len())]);
        let (base, ours): (Vec<f64>, Vec<f64>) = drawn.unzip();
        found.push(of(&base, &ours));
    }
    Interval {
        at,
        low: quantile(&found, 0.025),
        high: quantile(&found, 0.975),
    }
}

/// A value and its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The value.
    pub at: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// How far the farther end is from `centre`: a control that lies off its centre counts as noise, too.
    pub fn reach(&self, centre: f64) -> f64 {
        (self.high - centre).abs().max((self.low - centre).abs())
    }

    /// Both ends and the value through a rising function.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self {
            at: f(self.at),
            low: f(self.low),
            high: f(self.high),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-12);
        assert!((quantile(&[0.0, 10.0], 0.95) - 9.5).abs() < 1e-12);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_same_seed_gives_the_same_order_and_every_place_is_used() {
        let mut seen = [0; 3];
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        for _ in 0..3000 {
            let order = a.order(3);
            assert_eq!(order, b.order(3));
            seen[order[0]] += 1;
        }
        assert!(seen.iter().all(|n| (900..1100).contains(n)), "{seen:?}");
    }

    #[test]
    fn the_interval_covers_the_true_median_about_nineteen_times_in_twenty() {
        let mut random = Random::new(1);
        let mut covered = 0;
        for _ in 0..200 {
            let sample: Vec<f64> = (0..40).map(|_| f64::from(u32::try_from(random.below(1000)).unwrap())).collect();
            let i = interval(&sample, 0.5, &mut random);
            assert!(i.low <= i.at && i.at <= i.high);
            covered += i32::from(i.low <= 499.5 && 499.5 <= i.high);
        }
        println!("covered {covered} of 200");
        assert!(covered >= 175, "{covered}");
    }

    #[test]
    fn too_small_a_sample_resolves_nothing() {
        let i = interval(&[1.0, 1.0], 0.5, &mut Random::new(1));
        assert!(i.reach(1.0).is_infinite());
    }
}
