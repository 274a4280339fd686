//! What only the process that made it may use.
//!
//! A forked child has copies of our objects, but none of our threads, and none
//! of the mappings. Using them would hang or fault, and dropping them would
//! unmap addresses that the child may use for something else by now. So a child
//! gets an error, and its copies are left as they are.

use pyo3::PyResult;

use crate::errors::forked;

/// A value that refuses to be used, and to be dropped, in a forked child.
#[derive(Debug)]
pub(crate) struct Owned<T> {
    value: Option<T>,
    process: u32,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), process: std::process::id() }
    }

    /// Whether this is the process that made it.
    pub(crate) fn is_here(&self) -> bool {
        self.process == std::process::id()
    }

    /// The value.
    ///
    /// # Errors
    /// `ForkedError` in a child of the process that made it.
    pub(crate) fn here(&self) -> PyResult<&T> {
        match &self.value {
            Some(value) if self.is_here() => Ok(value),
            Some(_) | None => Err(forked()),
        }
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        let value = self.value.take();
        if !self.is_here() {
            std::mem::forget(value);
        }
    }
}
