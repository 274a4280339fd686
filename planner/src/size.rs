//! How many workers of each role the present load needs.
//!
//! Pure: a view, the time and the state of earlier decisions go in, changes
//! with their reasons come out. Growth needs a load that lasts and a settled
//! fleet; shrinking goes down to the highest need of the whole quiet period,
//! so one step of load makes one step of workers.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use terrace_proto::v1;

/// What a worker is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates tokens.
    Decode,
}

impl Role {
    /// The word in worker names, subcommands, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Fewest and most workers of a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Never fewer.
    pub min: u32,
    /// Never more. At least `min`.
    pub max: u32,
}

/// What the planner aims for.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Prefill workers.
    pub prefill: Bounds,
    /// Decode workers.
    pub decode: Bounds,
    /// Waiting prompt tokens should be computed within this time.
    pub target: Duration,
    /// A need must last this long before a worker is started for it.
    pub hold: Duration,
    /// After a change, no growth for this long: a new worker has to load its model first.
    pub settle: Duration,
    /// A worker goes when it was not needed for this long.
    pub quiet: Duration,
    /// Prefill rate to assume until one is measured, in tokens per second.
    pub rate_assumed: f64,
}

/// Share of its measured rate that a prefill worker may be planned to use.
const USE_MAX: f64 = 0.75;
/// Time over which routers sum what they report, in seconds.
const PRESSURE_SECONDS: f64 = 10.0;
/// Requests a decode worker is taken to serve at once when it does not say.
const REQUESTS_ASSUMED: u32 = 4;

/// What the workers of one role report, added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoleView {
    /// Workers that report and are not draining.
    pub workers: u32,
    /// Requests active or waiting.
    pub requests: u64,
    /// Requests that one worker takes at once; 0 if none says.
    pub requests_max: u32,
    /// Prompt tokens not yet computed.
    pub pending_tokens: u64,
    /// Mean measured prefill rate of one worker, in tokens per second; 0 if none measured it.
    pub prefill_rate: f64,
}

/// What the routers report, added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PressureView {
    /// Prompt tokens waiting that no tier holds.
    pub missing_tokens: u64,
    /// Prompt tokens of the requests finished in the last ten seconds.
    pub prompt_tokens: u64,
    /// Of those, from the cache.
    pub cached_tokens: u64,
    /// Requests generating now.
    pub decoding: u64,
    /// Worst median time to first token, in milliseconds.
    pub ttft_ms: f64,
}

/// Everything a decision looks at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Prefill workers.
    pub prefill: RoleView,
    /// Decode workers.
    pub decode: RoleView,
    /// Routers.
    pub pressure: PressureView,
}

impl View {
    /// Adds up the current reports. Numbers that make no sense count as absent.
    pub fn from_reports(reports: &v1::ObserveResponse) -> Self {
        let mut view = Self::default();
        let mut rates = 0u32;
        for load in &reports.workers {
            let prefill = load.role() == v1::WorkerRole::Prefill;
            let role = match load.role() {
                v1::WorkerRole::Prefill => &mut view.prefill,
                v1::WorkerRole::Decode => &mut view.decode,
                v1::WorkerRole::Unspecified => continue,
            };
            if load.draining {
                continue;
            }
            role.workers += 1;
            role.requests += u64::from(load.active_requests) + u64::from(load.queued_requests);
            role.requests_max = role.requests_max.max(load.requests_max);
            role.pending_tokens = role.pending_tokens.saturating_add(load.pending_tokens);
            if prefill && load.prefill_tokens_per_second.is_finite() && load.prefill_tokens_per_second > 0.0 {
                role.prefill_rate += load.prefill_tokens_per_second;
                rates += 1;
            }
        }
        if rates > 0 {
            view.prefill.prefill_rate /= f64::from(rates);
        }
        for pressure in &reports.pressures {
            let sum = &mut view.pressure;
            sum.missing_tokens = sum.missing_tokens.saturating_add(pressure.missing_tokens);
            sum.prompt_tokens = sum.prompt_tokens.saturating_add(pressure.prompt_tokens);
            sum.cached_tokens = sum.cached_tokens.saturating_add(pressure.cached_tokens);
            sum.decoding += u64::from(pressure.decoding_requests);
            if pressure.ttft_ms_p50.is_finite() {
                sum.ttft_ms = sum.ttft_ms.max(pressure.ttft_ms_p50);
            }
        }
        view
    }
}

/// A change of the wanted number of workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Of which role.
    pub role: Role,
    /// Wanted before.
    pub from: u32,
    /// Wanted now.
    pub to: u32,
    /// Why, as a clause with the figures that led to it.
    pub reason: String,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}: {}", self.role, self.from, self.to, self.reason)
    }
}

/// What earlier decisions left behind. Times are since the planner's start.
#[derive(Debug, Default)]
pub struct State {
    prefill: RoleState,
    decode: RoleState,
}

#[derive(Debug, Default)]
struct RoleState {
    wanted: u32,
    changed: Option<Duration>,
    /// Since when more is needed than wanted.
    short_since: Option<Duration>,
    /// Needs seen in the quiet period, falling from front to back: at most one
    /// entry a number of workers.
    needs: VecDeque<(Duration, u32)>,
}

impl State {
    /// Workers wanted now.
    pub fn wanted(&self, role: Role) -> u32 {
        match role {
            Role::Prefill => self.prefill.wanted,
            Role::Decode => self.decode.wanted,
        }
    }
}

/// Looks at the load and changes the wanted numbers where that is due.
pub fn decide(view: &View, now: Duration, state: &mut State, policy: &Policy) -> Vec<Decision> {
    let prefill = prefill_need(view, policy);
    let decode = decode_need(view, policy);
    [
        step(Role::Prefill, policy.prefill, prefill, now, &mut state.prefill, policy),
        step(Role::Decode, policy.decode, decode, now, &mut state.decode, policy),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Workers that the load needs, unbounded, and the figures behind that.
struct Need {
    workers: u32,
    figures: String,
}

fn prefill_need(view: &View, policy: &Policy) -> Need {
    let measured = view.prefill.prefill_rate;
    let rate = if measured > 0.0 { measured } else { policy.rate_assumed.max(1.0) };
    // A router's waiting tokens may sit in a worker's queue already: the larger
    // number counts, not the sum.
    let backlog = view.prefill.pending_tokens.max(view.pressure.missing_tokens);
    let seconds = as_f64(backlog) / rate;
    let by_backlog = ceil_count(seconds / policy.target.as_secs_f64().max(0.001));
    let computed = view.pressure.prompt_tokens.saturating_sub(view.pressure.cached_tokens);
    let by_rate = ceil_count(as_f64(computed) / PRESSURE_SECONDS / (rate * USE_MAX));
    // What trickles in is a decode worker's or the one prefill worker's business.
    let by_rate = if by_rate <= 1 { 0 } else { by_rate };
    let mut figures = format!(
        "{} missing tokens queued, {seconds:.1} s at {rate:.0} tokens/s{}; target {:.1} s",
        thousands(backlog),
        if measured > 0.0 { "" } else { " (assumed)" },
        policy.target.as_secs_f64()
    );
    if by_rate > by_backlog {
        figures.push_str(&format!("; {:.0} tokens/s arrive uncached", as_f64(computed) / PRESSURE_SECONDS));
    }
    if view.pressure.prompt_tokens > 0 {
        let hits = as_f64(view.pressure.cached_tokens) / as_f64(view.pressure.prompt_tokens);
        figures.push_str(&format!(
            "; hit ratio {:.0} %, first token {:.0} ms",
            hits * 100.0,
            view.pressure.ttft_ms
        ));
    }
    Need { workers: by_backlog.max(by_rate), figures }
}

fn decode_need(view: &View, _policy: &Policy) -> Need {
    let each = match view.decode.requests_max {
        0 => REQUESTS_ASSUMED,
        said => said,
    };
    let requests = view.decode.requests.max(view.pressure.decoding);
    let workers = u32::try_from(requests.div_ceil(u64::from(each))).unwrap_or(u32::MAX);
    Need { workers, figures: format!("{requests} requests decoding, {each} a worker") }
}

fn step(
    role: Role,
    bounds: Bounds,
    need: Need,
    now: Duration,
    state: &mut RoleState,
    policy: &Policy,
) -> Option<Decision> {
    assert!(bounds.min <= bounds.max, "bounds of {role} are upside down");
    let needed = need.workers.clamp(bounds.min, bounds.max);
    while state.needs.back().is_some_and(|(_, earlier)| *earlier <= needed) {
        state.needs.pop_back();
    }
    state.needs.push_back((now, needed));
    while state.needs.front().is_some_and(|(seen, _)| now.saturating_sub(*seen) > policy.quiet) {
        state.needs.pop_front();
    }
    let from = state.wanted;
    let Some(changed) = state.changed else {
        state.wanted = bounds.min;
        state.changed = Some(now);
        let reason = format!("start; bounds {} to {}", bounds.min, bounds.max);
        return (bounds.min > 0).then_some(Decision { role, from, to: bounds.min, reason });
    };
    if needed > from {
        let since = *state.short_since.get_or_insert(now);
        let settled = now.saturating_sub(changed) >= policy.settle;
        let lasting = now.saturating_sub(since) >= policy.hold;
        if !(settled && lasting) {
            return None;
        }
        state.short_since = None;
        state.wanted = needed;
        state.changed = Some(now);
        return Some(Decision { role, from, to: needed, reason: need.figures });
    }
    state.short_since = None;
    let peak = state.needs.front().map_or(needed, |(_, most)| *most);
    if peak < from && now.saturating_sub(changed) >= policy.quiet {
        state.wanted = peak;
        state.changed = Some(now);
        let reason =
            format!("at most {peak} needed for {:.0} s; now {}", policy.quiet.as_secs_f64(), need.figures);
        return Some(Decision { role, from, to: peak, reason });
    }
    None
}

/// A token count as a float. Exact up to 2^53, far above any queue.
fn as_f64(count: u64) -> f64 {
    let high = u32::try_from(count >> 32).unwrap_or(u32::MAX);
    let low = u32::try_from(count & 0xffff_ffff).unwrap_or(u32::MAX);
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

/// The smallest whole number at or above `value`, for small counts: NaN and
/// negatives are 0, and anything past 10,000 is 10,000.
fn ceil_count(value: f64) -> u32 {
    const MOST: u32 = 10_000;
    (0..MOST).find(|count| f64::from(*count) >= value).unwrap_or(if value.is_nan() { 0 } else { MOST })
}

/// A number with a comma between thousands.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests;
