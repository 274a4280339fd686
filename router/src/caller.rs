//! Whose request it is.
//!
//! A gateway in front names the tenant in a header, by default the one that the
//! Gateway API's inference extension uses for fairness. Without it, callers are told
//! apart by their API key, of which only a hash is kept; all others are one tenant.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use axum::http::{HeaderMap, HeaderName, header};

use crate::admit::Caller;
use crate::admit::queue::Class;
use crate::config::BadConfig;

/// Longest name of a tenant that is told apart.
const NAME_BYTES_MAX: usize = 128;
/// The tenant of requests that name none.
const NOBODY: &str = "";
/// Smallest and largest weight of a tenant.
const WEIGHTS: std::ops::RangeInclusive<f64> = 0.01..=100.0;

/// How tenants are told apart.
#[derive(Clone, Debug)]
pub struct Callers {
    header: HeaderName,
    weights: BTreeMap<String, f64>,
    keys: RandomState,
}

impl Callers {
    /// By a header; weights are written `TENANT=WEIGHT`.
    ///
    /// # Errors
    /// When the header or a weight is none.
    pub fn new(header: &str, weights: &[String]) -> Result<Self, BadConfig> {
        let name = HeaderName::try_from(header);
        let header = name.map_err(|_| BadConfig::TenantHeader { found: header.to_owned() })?;
        let weight = |text: &String| {
            let (name, weight) = text.rsplit_once('=')?;
            let weight = weight.parse().ok().filter(|weight| WEIGHTS.contains(weight))?;
            Some((name.to_owned(), weight))
        };
        let weights = weights
            .iter()
            .map(|text| weight(text).ok_or_else(|| BadConfig::TenantWeight { found: text.clone() }));
        Ok(Self { header, weights: weights.collect::<Result<_, _>>()?, keys: RandomState::new() })
    }

    /// Who sends these headers; the class and the priority are the body's to say.
    pub fn caller(&self, headers: &HeaderMap) -> Caller {
        let named = headers.get(&self.header).and_then(|name| name.to_str().ok());
        let named = named.filter(|name| !name.is_empty() && name.len() <= NAME_BYTES_MAX);
        let key = headers.get(header::AUTHORIZATION).map(|key| self.keys.hash_one(key.as_bytes()));
        let tenant = match (named, key) {
            (Some(name), _) => name.to_owned(),
            (None, Some(key)) => format!("key {key:016x}"),
            (None, None) => NOBODY.to_owned(),
        };
        let weight = self.weights.get(&tenant).copied().unwrap_or(1.0);
        Caller { tenant, weight, class: Class::Default, priority: 0 }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    /// Tenants that are mistaken for each other share one share; a key must never be kept or shown.
    #[test]
    fn tenants_are_told_apart() {
        let callers = Callers::new("X-Team", &["red=2.5".to_owned()]).unwrap();
        let caller = |pairs: &[(&'static str, &'static str)]| {
            let pairs = pairs
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            callers.caller(&pairs.collect())
        };
        let red = caller(&[("x-team", "red"), ("authorization", "Bearer one")]);
        assert_eq!((red.tenant.as_str(), red.weight), ("red", 2.5));
        let (one, two) =
            (caller(&[("authorization", "Bearer one")]), caller(&[("authorization", "Bearer two")]));
        assert_ne!(one.tenant, two.tenant);
        assert_eq!(one.tenant, caller(&[("authorization", "Bearer one"), ("x-team", "")]).tenant);
        assert!(!one.tenant.contains("one") && one.weight == 1.0);
        assert_eq!(caller(&[]).tenant, NOBODY);
    }
}
