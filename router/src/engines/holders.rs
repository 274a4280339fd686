//! Numbers of holders that are no daemons, by name.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terrace_index::{HolderId, Index};

use crate::names::Names;

/// Most publishers, ranks counted apart.
pub const ENGINE_HOLDERS_MAX: u32 = 4096;

/// Who has which number.
#[derive(Debug)]
pub(super) struct Holders {
    index: Arc<Index>,
    first: u32,
    /// Where what events tell of the inside of blocks goes.
    learned: Arc<Names>,
    names: Mutex<Vec<Option<String>>>,
}

/// One holder. What it held is forgotten when it is dropped.
#[derive(Debug)]
pub(super) struct Holder {
    id: HolderId,
    holders: Arc<Holders>,
}

impl Holders {
    /// Numbers from `first` on.
    pub(super) fn new(index: Arc<Index>, first: u32, learned: Arc<Names>) -> Self {
        Self { index, first, learned, names: Mutex::default() }
    }

    /// A number for a new holder; none if there are too many.
    pub(super) fn take(self: &Arc<Self>, name: String) -> Option<Holder> {
        let mut names = self.lock();
        let free = names.iter().position(Option::is_none).unwrap_or(names.len());
        let place = u32::try_from(free).ok().filter(|place| *place < ENGINE_HOLDERS_MAX)?;
        if free == names.len() {
            names.push(None);
        }
        names[free] = Some(name);
        Some(Holder { id: HolderId(self.first + place), holders: Arc::clone(self) })
    }

    /// Who has a number.
    pub(super) fn name(&self, id: HolderId) -> Option<String> {
        let place = id.0.checked_sub(self.first)?;
        self.lock().get(place as usize)?.clone()
    }

    /// Holders that there are.
    pub(super) fn count(&self) -> usize {
        self.lock().iter().flatten().count()
    }

    pub(super) fn learned(&self) -> &Names {
        &self.learned
    }

    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<String>>> {
        // Each change is one assignment.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holder {
    pub(super) fn id(&self) -> HolderId {
        self.id
    }

    /// It holds nothing any more.
    pub(super) fn forget(&self) {
        self.holders.index.clear(self.id).expect("the index was made for all publishers' holders");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Before its number is free: its next owner begins with nothing.
        self.forget();
        let place = (self.id.0 - self.holders.first) as usize;
        self.holders.lock()[place] = None;
    }
}
