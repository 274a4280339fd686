//! One curve over all tenants of a tier and one for each of the first few, where there is more than one.

use std::collections::BTreeMap;

use crate::ids::TenantId;
use crate::policy::curve::{Asked, Curve, CurvePoint, Lookup};

/// Sampled blocks of the curve over all (670 KB), and of a tenant's (170 KB).
const ENTRIES_ALL: u32 = 8192;
const ENTRIES_TENANT: u32 = 2048;
/// Tenants with a curve of their own: 11 MB at most. Later ones count in the curve over all only.
const TENANTS_MAX: usize = 64;

/// The curves of one tier.
#[derive(Clone, Debug)]
pub struct Curves {
    size: u64,
    all: Curve,
    /// The one tenant there is: its curve is the one over all.
    only: Option<TenantId>,
    tenants: BTreeMap<TenantId, Curve>,
}

impl Curves {
    /// For a tier of this size, in the unit of [`Lookup::size`].
    pub fn new(size: u64) -> Self {
        Self { size, all: Curve::new(size, ENTRIES_ALL), only: None, tenants: BTreeMap::new() }
    }

    /// The tier has this size from now on: counts start anew.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        self.all.resize(size);
        self.tenants.values_mut().for_each(|curve| curve.resize(size));
    }

    /// A tenant's request for a prefix: what all of it asks for, and its blocks, head first, of which those
    /// that [`Curves::shift`] leaves out may be missing.
    pub fn request(&mut self, tenant: TenantId, asked: Asked, blocks: impl Iterator<Item = Lookup> + Clone) {
        self.tell_apart(tenant);
        self.all.request(asked, blocks.clone());
        if self.only == Some(tenant) {
            return;
        }
        if self.tenants.len() < TENANTS_MAX || self.tenants.contains_key(&tenant) {
            let size = self.size;
            self.tenants
                .entry(tenant)
                .or_insert_with(|| Curve::new(size, ENTRIES_TENANT))
                .request(asked, blocks);
        }
    }

    /// From a second tenant on, the first one has a curve of its own too.
    fn tell_apart(&mut self, tenant: TenantId) {
        match self.only {
            None if self.tenants.is_empty() => self.only = Some(tenant),
            Some(only) if only != tenant => {
                self.tenants.insert(only, self.all.of_at_most(ENTRIES_TENANT));
                self.only = None;
            }
            Some(_) | None => {}
        }
    }

    /// A tenant's block is looked at only if so many leading bits of its key are zero.
    pub(crate) fn shift(&self, tenant: TenantId) -> u32 {
        let own = match self.tenants.get(&tenant) {
            Some(curve) => curve.shift(),
            None if self.only == Some(tenant) => u32::MAX,
            None if self.tenants.len() < TENANTS_MAX => 0,
            None => u32::MAX,
        };
        own.min(self.all.shift())
    }

    /// The curve of a tenant, or over all.
    pub(crate) fn find(&self, tenant: Option<TenantId>) -> Option<&Curve> {
        match tenant {
            None => Some(&self.all),
            Some(tenant) if self.only == Some(tenant) => Some(&self.all),
            Some(tenant) => self.tenants.get(&tenant),
        }
    }

    /// The curve over all tenants.
    pub fn all(&self) -> Vec<CurvePoint> {
        self.all.points()
    }

    /// What a tenant would get if it had the tier alone; `None` if it has no curve.
    pub fn tenant(&self, tenant: TenantId) -> Option<Vec<CurvePoint>> {
        self.find(Some(tenant)).map(Curve::points)
    }

    /// Tenants that have a curve, in order.
    pub fn tenants(&self) -> impl Iterator<Item = TenantId> + '_ {
        self.only.into_iter().chain(self.tenants.keys().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(curves: &mut Curves, tenant: TenantId, number: u64) {
        // Spread over all keys, so that a sample has its part of them.
        let lookup = |number: u64| Lookup {
            key: number.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            size: 1,
            tokens: 64,
            seconds: 0.1,
        };
        let blocks = (0..8).map(|at| lookup(number * 8 + at));
        curves.request(tenant, Asked { tokens: 512.0, seconds: 0.8 }, blocks);
    }

    /// The only tenant's curve is kept once, for both. A second tenant must not cost the first one what is known.
    #[test]
    fn the_first_of_two_tenants_keeps_its_curve() {
        let (first, second, size) = (TenantId::from_bytes([1; 16]), TenantId::from_bytes([2; 16]), 10_000);
        let mut curves = Curves::new(size);
        for turn in 0..4 {
            (0..4_000).for_each(|number| ask(&mut curves, first, number * 7 % 4_000));
            assert_eq!(curves.tenant(first), Some(curves.all()), "turn {turn}");
        }
        assert_eq!((curves.tenants().collect::<Vec<_>>(), curves.tenant(second)), (vec![first], None));
        let before = curves.all();
        ask(&mut curves, second, 1 << 40);
        assert_eq!(curves.tenants().collect::<Vec<_>>(), [first, second]);
        let after = curves.tenant(first).unwrap();
        let differ =
            before.iter().zip(&after).map(|(before, after)| (before.token_hits - after.token_hits).abs());
        assert!(differ.fold(0.0, f64::max) < 0.01, "{before:?}, then {after:?}");
        let entries = |tenant| curves.find(Some(tenant)).unwrap().sampled_one_of();
        assert!(entries(first) > curves.all.sampled_one_of(), "a tenant's sample is the smaller one");
        // From here on each has its own.
        (0..4_000).for_each(|number| ask(&mut curves, second, (1 << 41) + number));
        let hits = |curves: &Curves, tenant| curves.tenant(tenant).unwrap().last().unwrap().token_hits;
        let (old, new) = (hits(&curves, first), hits(&curves, second));
        assert!(old > 0.7 && new < 0.05, "{old} and {new}");
        (0..4_000).for_each(|number| ask(&mut curves, first, number * 7 % 4_000));
        assert!(hits(&curves, first) > 0.75, "{} after going on", hits(&curves, first));
    }
}
