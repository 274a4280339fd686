//! What clients were answered whose connection has ended, for repeats over the next one.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::{ClientId, TenantId};
use crate::state::session::Repeats;

/// Clients that are remembered; past that the first to go is forgotten.
const DEPARTED_MAX: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Departed {
    answers: BTreeMap<(TenantId, ClientId), Repeats>,
    order: VecDeque<(TenantId, ClientId)>,
}

impl Departed {
    /// Remembers what still holds without the session.
    pub(crate) fn keep(&mut self, client: (TenantId, ClientId), mut answers: Repeats) {
        answers.depart();
        if answers.is_empty() {
            return;
        }
        while self.order.len() >= DEPARTED_MAX {
            let Some(oldest) = self.order.pop_front() else { break };
            self.answers.remove(&oldest);
        }
        if self.answers.insert(client, answers).is_none() {
            self.order.push_back(client);
        }
    }

    pub(crate) fn take(&mut self, client: (TenantId, ClientId)) -> Option<Repeats> {
        let answers = self.answers.remove(&client)?;
        self.order.retain(|other| *other != client);
        Some(answers)
    }

    pub(crate) fn check(&self) {
        assert_eq!(self.answers.len(), self.order.len(), "each client that went has its place");
        assert!(self.order.len() <= DEPARTED_MAX, "clients that went are limited");
    }
}
