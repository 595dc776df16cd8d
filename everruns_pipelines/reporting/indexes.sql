-- Recommended on the platform's tables: finds the events of a day without reading all of them.
CREATE INDEX CONCURRENTLY IF NOT EXISTS events_ts_projected ON events (ts)
WHERE event_type IN (
    'tool.completed', 'capability.usage', 'output.message.replaced',
    'turn.completed', 'turn.failed', 'turn.cancelled'
)
