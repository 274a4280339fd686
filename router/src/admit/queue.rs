//! Who of those that wait has the next turn.
//!
//! Pure: it reads no clock and wakes nobody. Turns are shared by estimated work
//! in tokens, not by requests, at two levels: service classes by fixed weights,
//! and tenants inside a class by theirs (start-time fair queueing: each class and
//! each tenant has a virtual time that work served for it moves on, and the
//! earliest one is next). One that was away does not save up turns, and one that
//! was served more than its share goes on owing it. Within a tenant, requests go by
//! their own priority, then by arrival.
//!
//! What a tenant waits for its first request is therefore at most the rest of one
//! turn and one turn of each other tenant of its class, however much these have
//! waiting. Room is shared too: when the queue is full, the last request of whoever has
//! most of it makes room for one that has less.

use std::collections::BTreeMap;

/// Tenants whose debts are remembered while they have nothing waiting.
const DEBTORS_MAX: usize = 256;

/// Service classes, the most urgent one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Somebody waits and pays for it.
    Priority,
    /// Everything that does not say.
    Default,
    /// May take longer.
    Flex,
}

impl Class {
    /// All of them, by urgency.
    pub const ALL: [Self; 3] = [Self::Priority, Self::Default, Self::Flex];

    /// Share of the work when every class has requests waiting.
    pub const fn weight(self) -> f64 {
        match self {
            Self::Priority => 16.0,
            Self::Default => 4.0,
            Self::Flex => 1.0,
        }
    }

    /// As OpenAI names them.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Priority => "priority",
            Self::Default => "default",
            Self::Flex => "flex",
        }
    }
}

/// A request that wants a turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Whose it is.
    pub tenant: String,
    /// How urgent.
    pub class: Class,
    /// Lower goes first among a tenant's own.
    pub priority: i32,
    /// Estimated work in tokens; at least 1.
    pub work: u64,
    /// Share of the tenant inside its class, against 1 for others; more than 0.
    pub weight: f64,
}

/// Names one waiting request.
pub type Ticket = u64;

/// What became of a request that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// It waits.
    Waiting(Ticket),
    /// It waits, and another one had to go.
    Displacing {
        /// The new one.
        ticket: Ticket,
        /// The one that is no longer in the queue.
        displaced: Ticket,
    },
    /// There is no room for it.
    Full,
}

/// Everything that waits.
#[derive(Clone, Debug)]
pub struct Queue {
    requests_max: usize,
    requests: usize,
    next: Ticket,
    /// Start of the last turn, in virtual time of classes.
    now: f64,
    classes: [Lane; 3],
}

/// The tenants of one class.
#[derive(Clone, Debug, Default)]
struct Lane {
    /// When the class has its next turn.
    start: f64,
    /// Start of its last turn, in virtual time of its tenants.
    now: f64,
    tenants: BTreeMap<String, Tenant>,
}

#[derive(Clone, Debug)]
struct Tenant {
    /// When it has its next turn.
    start: f64,
    weight: f64,
    /// By priority and arrival.
    waiting: BTreeMap<(i32, Ticket), u64>,
}

impl Queue {
    /// An empty queue that holds so many requests.
    pub fn new(requests_max: usize) -> Self {
        Self { requests_max, requests: 0, next: 0, now: 0.0, classes: Default::default() }
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.requests
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// A request wants a turn.
    pub fn enter(&mut self, ask: &Ask) -> Entered {
        let displaced = if self.requests < self.requests_max {
            None
        } else {
            let Some(displaced) = self.to_displace(ask) else { return Entered::Full };
            self.leave(displaced);
            Some(displaced)
        };
        self.next += 1;
        let ticket = self.next;
        let now = self.now;
        let lane = &mut self.classes[ask.class as usize];
        if lane.is_idle() {
            lane.start = lane.start.max(now);
        }
        lane.forget_idle();
        let now = lane.now;
        let tenant = lane.tenants.entry(ask.tenant.clone()).or_insert_with(|| Tenant {
            start: now,
            weight: ask.weight,
            waiting: BTreeMap::new(),
        });
        if tenant.waiting.is_empty() {
            tenant.start = tenant.start.max(now);
        }
        tenant.weight = ask.weight;
        tenant.waiting.insert((ask.priority, ticket), ask.work.max(1));
        self.requests += 1;
        match displaced {
            Some(displaced) => Entered::Displacing { ticket, displaced },
            None => Entered::Waiting(ticket),
        }
    }

    /// Who has the next turn.
    pub fn first(&self) -> Option<Ticket> {
        let busy = self.classes.iter().filter(|lane| !lane.is_idle());
        let lane = busy.min_by(|a, b| a.start.total_cmp(&b.start))?;
        lane.first().map(|(_, key, _)| key.1)
    }

    /// The first one has its turn. Returns its work; 0 if it is not the first.
    pub fn serve(&mut self, ticket: Ticket) -> u64 {
        if self.first() != Some(ticket) {
            return 0;
        }
        let busy = Class::ALL.into_iter().filter(|class| !self.classes[*class as usize].is_idle());
        let start = |class: &Class| self.classes[*class as usize].start;
        let Some(class) = busy.min_by(|a, b| start(a).total_cmp(&start(b))) else { return 0 };
        let lane = &mut self.classes[class as usize];
        let Some((name, key, work)) = lane.first() else { return 0 };
        let name = name.to_owned();
        self.now = lane.start;
        lane.start += tokens(work) / class.weight();
        if let Some(tenant) = lane.tenants.get_mut(&name) {
            lane.now = tenant.start;
            tenant.start += tokens(work) / tenant.weight;
            tenant.waiting.remove(&key);
        }
        self.requests -= 1;
        work
    }

    /// A request waits no longer.
    pub fn leave(&mut self, ticket: Ticket) {
        for lane in &mut self.classes {
            for tenant in lane.tenants.values_mut() {
                let before = tenant.waiting.len();
                tenant.waiting.retain(|key, _| key.1 != ticket);
                self.requests -= before - tenant.waiting.len();
            }
        }
    }

    /// A tenant's request turned out to be so much more work than was charged, or less.
    pub fn settle(&mut self, tenant: &str, class: Class, charged: u64, actual: u64) {
        let lane = &mut self.classes[class as usize];
        let more = tokens(actual) - tokens(charged);
        lane.start += more / class.weight();
        if let Some(tenant) = lane.tenants.get_mut(tenant) {
            tenant.start += more / tenant.weight;
        }
    }

    /// All work that waits.
    pub fn all_work(&self) -> u64 {
        let tenants = self.classes.iter().flat_map(|lane| lane.tenants.values());
        tenants.flat_map(|tenant| tenant.waiting.values()).sum()
    }

    /// Work that has its turn before a request, if nobody else comes.
    pub fn ahead(&self, ticket: Ticket) -> u64 {
        let mut rest = self.waiting_only("");
        let mut work = 0;
        while let Some(first) = rest.first().filter(|&first| first != ticket) {
            work += rest.serve(first);
        }
        work
    }

    /// Work that would have its turn before a request that comes now and finds room.
    pub fn ahead_of(&self, ask: &Ask) -> u64 {
        let mut rest = self.waiting_only(&ask.tenant);
        rest.requests_max = usize::MAX;
        match rest.enter(ask) {
            Entered::Waiting(ticket) => rest.ahead(ticket),
            Entered::Displacing { .. } | Entered::Full => 0,
        }
    }

    /// A copy without tenants that wait for nothing, but for one.
    fn waiting_only(&self, but: &str) -> Self {
        let mut copy = self.clone();
        for lane in &mut copy.classes {
            lane.tenants.retain(|name, tenant| !tenant.waiting.is_empty() || name == but);
        }
        copy
    }

    /// The last request of whoever has most waiting for its weight, if that is more than the new one would have.
    fn to_displace(&self, ask: &Ask) -> Option<Ticket> {
        let share = |class: Class, tenant: &Tenant, more: usize| {
            tokens((tenant.waiting.len() + more) as u64) / (tenant.weight * class.weight())
        };
        let tenants = Class::ALL.into_iter().flat_map(|class| {
            self.classes[class as usize].tenants.values().map(move |tenant| (class, tenant))
        });
        let (class, largest) = tenants.max_by(|a, b| share(a.0, a.1, 0).total_cmp(&share(b.0, b.1, 0)))?;
        let own =
            self.classes[ask.class as usize].tenants.get(&ask.tenant).map_or(0, |own| own.waiting.len());
        let own = tokens((own + 1) as u64) / (ask.weight * ask.class.weight());
        if own >= share(class, largest, 0) {
            return None;
        }
        largest.waiting.last_key_value().map(|(key, _)| key.1)
    }
}

impl Lane {
    fn is_idle(&self) -> bool {
        self.tenants.values().all(|tenant| tenant.waiting.is_empty())
    }

    /// The tenant whose turn it is, and its first request.
    fn first(&self) -> Option<(&str, (i32, Ticket), u64)> {
        let waiting = self.tenants.iter().filter_map(|(name, tenant)| {
            tenant.waiting.first_key_value().map(|(key, work)| (name, tenant.start, *key, *work))
        });
        // Equals go by arrival.
        let first = waiting.min_by(|a, b| a.1.total_cmp(&b.1).then(a.2.1.cmp(&b.2.1)))?;
        Some((first.0, first.2, first.3))
    }

    /// Tenants that wait for nothing and owe nothing are like new ones.
    fn forget_idle(&mut self) {
        if self.tenants.len() < DEBTORS_MAX {
            return;
        }
        let now = self.now;
        self.tenants.retain(|_, tenant| !tenant.waiting.is_empty() || tenant.start > now);
        while self.tenants.len() >= DEBTORS_MAX {
            let idle = self.tenants.iter().filter(|(_, tenant)| tenant.waiting.is_empty());
            let least = idle.min_by(|a, b| a.1.start.total_cmp(&b.1.start));
            let Some(least) = least.map(|(name, _)| name.clone()) else { return };
            self.tenants.remove(&least);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
fn tokens(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests;
