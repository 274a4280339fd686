//! Who may come in, and whose turn it is to be sent to a worker.
//!
//! Requests wait here, not at the workers: a worker is given no more than it can
//! take, so that an urgent request, or one of a tenant that asks for little, is never
//! behind a flood that came before it. [`queue`] decides the order; this wakes
//! whoever is first, learns how quickly turns come ([`pace`]), and tells those who
//! are refused when to come back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::IntGauge;
use tokio::sync::Notify;

pub mod pace;
pub mod queue;

use pace::Pace;
use queue::{Ask, Class, Entered, Queue, Ticket};

/// What a generated token counts, in prompt tokens, as in most price lists.
const GENERATED_WORK: u64 = 4;
/// Tokens of an answer before any has ended.
const ANSWER_TOKENS_GUESS: f64 = 64.0;
/// How much one answer changes what the next one is expected to be.
const ANSWER_SHARE: f64 = 0.05;
/// Of the places for requests in progress, one in so many is kept for tenants that have few.
const KEPT_SHARE: usize = 8;

/// The limits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most requests in progress.
    pub requests_max: usize,
    /// Most requests that wait for a worker.
    pub queue_max: usize,
}

/// Why a request may not come in or wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Refused {
    /// Every place for requests in progress is taken.
    Places,
    /// This tenant has all the places that one may have.
    TenantPlaces(usize),
    /// The queue is full, or others have less in it. Seconds until it would have had its turn.
    Queue(f64),
}

/// The door of one router.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    clock: Instant,
    state: Arc<Mutex<State>>,
    in_progress: IntGauge,
    waiting: IntGauge,
}

#[derive(Debug, Default)]
struct State {
    places: BTreeMap<String, usize>,
    lines: BTreeMap<String, Line>,
}

/// Those that wait for the workers of one model.
#[derive(Debug)]
struct Line {
    queue: Queue,
    pace: Pace,
    waiters: BTreeMap<Ticket, Arc<Notify>>,
    answer_tokens: f64,
}

/// Who asks, and how urgently.
#[derive(Clone, Debug, PartialEq)]
pub struct Caller {
    /// Whose request it is.
    pub tenant: String,
    /// Share of the tenant, against 1 for others.
    pub weight: f64,
    /// Service class.
    pub class: Class,
    /// Lower goes first among the tenant's own.
    pub priority: i32,
}

/// A place among the requests in progress; given back when dropped.
#[derive(Debug)]
pub struct Place {
    state: Arc<Mutex<State>>,
    tenant: String,
    gauge: IntGauge,
}

/// A request that waits for its turn; it leaves the queue when dropped.
#[derive(Debug)]
pub struct Waiting {
    state: Arc<Mutex<State>>,
    clock: Instant,
    line: String,
    caller: Caller,
    ticket: Ticket,
    woken: Arc<Notify>,
    gauge: IntGauge,
}

/// What a request was charged for; put right when dropped.
#[derive(Debug)]
pub struct Charge {
    state: Arc<Mutex<State>>,
    line: String,
    caller: Caller,
    charged: u64,
    /// Prompt tokens computed for it.
    pub prompt: u64,
    /// Tokens generated so far.
    pub generated: u64,
}

impl Admission {
    /// Nobody is in.
    pub fn new(limits: Limits, in_progress: IntGauge, waiting: IntGauge) -> Self {
        Self { limits, clock: Instant::now(), state: Arc::default(), in_progress, waiting }
    }

    /// Lets a request in.
    ///
    /// # Errors
    /// When as many as allowed are in progress, of all or of this tenant.
    pub fn come_in(&self, tenant: &str) -> Result<Place, Refused> {
        let mut state = lock(&self.state);
        let all: usize = state.places.values().sum();
        if all >= self.limits.requests_max {
            return Err(Refused::Places);
        }
        let most = self.limits.requests_max - self.limits.requests_max / KEPT_SHARE;
        let own = state.places.get(tenant).copied().unwrap_or(0);
        if own >= most {
            return Err(Refused::TenantPlaces(most));
        }
        state.places.insert(tenant.to_owned(), own + 1);
        drop(state);
        self.in_progress.inc();
        Ok(Place {
            state: Arc::clone(&self.state),
            tenant: tenant.to_owned(),
            gauge: self.in_progress.clone(),
        })
    }

    /// Waits in the line of a model's workers, with so many prompt tokens to compute and at most so many to
    /// generate.
    ///
    /// # Errors
    /// When there is no room.
    pub fn enter(
        &self,
        model: &str,
        caller: &Caller,
        prompt_tokens: u64,
        tokens_max: u64,
    ) -> Result<Waiting, Refused> {
        let now = self.clock.elapsed().as_secs_f64();
        let mut state = lock(&self.state);
        let line = state.lines.entry(model.to_owned()).or_insert_with(|| Line {
            queue: Queue::new(self.limits.queue_max),
            pace: Pace::default(),
            waiters: BTreeMap::new(),
            answer_tokens: ANSWER_TOKENS_GUESS,
        });
        let ask = Ask {
            tenant: caller.tenant.clone(),
            class: caller.class,
            priority: caller.priority,
            work: prompt_tokens + GENERATED_WORK * tokens_max.min(whole(line.answer_tokens)),
            weight: caller.weight,
        };
        let ticket = match line.queue.enter(&ask) {
            Entered::Waiting(ticket) => ticket,
            Entered::Displacing { ticket, displaced } => {
                // It finds itself gone.
                line.wake(Some(displaced));
                line.waiters.remove(&displaced);
                ticket
            }
            Entered::Full => return Err(Refused::Queue(line.pace.seconds(line.queue.ahead_of(&ask)))),
        };
        let woken = Arc::new(Notify::new());
        line.waiters.insert(ticket, Arc::clone(&woken));
        if line.queue.len() == 1 {
            line.pace.begin(now);
        }
        line.wake(line.queue.first());
        drop(state);
        self.waiting.inc();
        Ok(Waiting {
            state: Arc::clone(&self.state),
            clock: self.clock,
            line: model.to_owned(),
            caller: caller.clone(),
            ticket,
            woken,
            gauge: self.waiting.clone(),
        })
    }
}

impl Waiting {
    /// Whether it is its turn. To be asked again after each [`Waiting::turn`]: somebody more urgent may have
    /// come since.
    ///
    /// # Errors
    /// When it had to make room for a tenant that has less waiting.
    pub fn is_first(&self) -> Result<bool, Refused> {
        let mut state = lock(&self.state);
        let Some(line) = state.lines.get_mut(&self.line) else { return Ok(false) };
        if !line.waiters.contains_key(&self.ticket) {
            return Err(Refused::Queue(line.pace.seconds(line.queue.all_work())));
        }
        Ok(line.queue.first() == Some(self.ticket))
    }

    /// Waits until it may be first, at most so long. Cancel-safe.
    pub async fn turn(&self, most: Duration) {
        // Whether it was woken or time is over, the caller looks.
        let _ = tokio::time::timeout(most, self.woken.notified()).await;
    }

    /// Seconds until its turn, if nobody else comes; 0 before anything is known.
    pub fn seconds(&self) -> f64 {
        let mut state = lock(&self.state);
        let line = state.lines.get_mut(&self.line);
        line.map_or(0.0, |line| line.pace.seconds(line.queue.ahead(self.ticket)))
    }

    /// It was sent to a worker, which has so many prompt tokens to compute.
    pub fn served(self, prompt_tokens: u64) -> Charge {
        let now = self.clock.elapsed().as_secs_f64();
        let mut state = lock(&self.state);
        let mut charged = 0;
        if let Some(line) = state.lines.get_mut(&self.line) {
            charged = line.queue.serve(self.ticket);
            line.pace.served(charged, now, !line.queue.is_empty());
        }
        drop(state);
        Charge {
            state: Arc::clone(&self.state),
            line: self.line.clone(),
            caller: self.caller.clone(),
            charged,
            prompt: prompt_tokens,
            generated: 0,
        }
    }
}

impl Line {
    fn wake(&self, ticket: Option<Ticket>) {
        if let Some(waiter) = ticket.and_then(|ticket| self.waiters.get(&ticket)) {
            waiter.notify_one();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if let Some(line) = state.lines.get_mut(&self.line) {
            line.queue.leave(self.ticket);
            line.waiters.remove(&self.ticket);
            if line.queue.is_empty() {
                line.pace.end();
            }
            line.wake(line.queue.first());
        }
        drop(state);
        self.gauge.dec();
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let Some(line) = state.lines.get_mut(&self.line) else { return };
        let actual = self.prompt + GENERATED_WORK * self.generated;
        line.queue.settle(&self.caller.tenant, self.caller.class, self.charged, actual);
        let generated = u32::try_from(self.generated).unwrap_or(u32::MAX);
        line.answer_tokens += ANSWER_SHARE * (f64::from(generated) - line.answer_tokens);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if let Some(count) = state.places.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                state.places.remove(&self.tenant);
            }
        }
        drop(state);
        self.gauge.dec();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Each change is complete before the lock is let go.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a mean of token counts: not negative and far below 2^52"
)]
fn whole(tokens: f64) -> u64 {
    tokens.ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(requests_max: usize, queue_max: usize) -> Admission {
        let gauge = |name| IntGauge::new(name, "x").unwrap();
        Admission::new(Limits { requests_max, queue_max }, gauge("a"), gauge("b"))
    }

    fn caller(tenant: &str) -> Caller {
        Caller { tenant: tenant.to_owned(), weight: 1.0, class: Class::Default, priority: 0 }
    }

    /// A tenant with every place would lock all others out of the door itself, before any queue could be fair.
    #[test]
    fn one_tenant_never_has_every_place() {
        let door = admission(16, 4);
        let mut places: Vec<Place> = (0..14).map(|_| door.come_in("flood").unwrap()).collect();
        assert_eq!(door.come_in("flood").unwrap_err(), Refused::TenantPlaces(14));
        places.extend((0..2).map(|_| door.come_in("quiet").unwrap()));
        assert_eq!(door.come_in("quiet").unwrap_err(), Refused::Places);
        assert_eq!(door.in_progress.get(), 16);
        drop(places);
        assert_eq!((door.in_progress.get(), lock(&door.state).places.len()), (0, 0));
        assert!(door.come_in("flood").is_ok());
    }

    /// A turn that is lost stops the whole line: whoever is first must be woken when the one before it was
    /// served, gave up or was displaced, and when somebody more urgent came and went.
    #[tokio::test]
    async fn turns_are_never_lost() {
        let door = admission(16, 3);
        let first = door.enter("m", &caller("a"), 10, 5).unwrap();
        let second = door.enter("m", &caller("a"), 10, 5).unwrap();
        let third = door.enter("m", &caller("a"), 10, 5).unwrap();
        assert_eq!((first.is_first(), second.is_first()), (Ok(true), Ok(false)));
        // Woken before it waits: the turn must not be lost either.
        let mut charge = first.served(10);
        charge.generated = 5;
        drop(charge);
        let long = Duration::from_secs(20);
        let began = Instant::now();
        second.turn(long).await;
        assert_eq!(second.is_first(), Ok(true));
        let urgent = Caller { class: Class::Priority, ..caller("b") };
        let urgent = door.enter("m", &urgent, 10, 5).unwrap();
        assert_eq!((urgent.is_first(), second.is_first()), (Ok(true), Ok(false)));
        drop(urgent);
        second.turn(long).await;
        drop(second);
        third.turn(long).await;
        assert_eq!(third.is_first(), Ok(true));
        let rest: Vec<Waiting> = (0..2).map(|_| door.enter("m", &caller("a"), 10, 5).unwrap()).collect();
        assert!(matches!(door.enter("m", &caller("a"), 10, 5), Err(Refused::Queue(_))));
        let other = door.enter("m", &caller("b"), 10, 5).unwrap();
        rest[1].turn(long).await;
        assert!(matches!(rest[1].is_first(), Err(Refused::Queue(_))));
        assert!(began.elapsed() < long, "somebody was not woken");
        drop((third, rest, other));
        assert_eq!(door.waiting.get(), 0);
    }
}
