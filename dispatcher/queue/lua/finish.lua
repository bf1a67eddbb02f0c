-- Gives tasks up: state, result, dead letter or retry in one step. Under memory pressure this
-- frees more than it writes. ARGV per task:
--   id, owner, action, state, reason, message, exit_code, started_ms, finished_ms, dead, delay_ms, budget,
--   prefer.
-- action: final; retry (a new attempt); release (the same attempt, which has no container yet);
--   detach (the same attempt, whose container may be there: for an instance on its daemon).
-- budget, for all but final: app, infra or none.
-- prefer, for a release without delay: a daemon that the task is kept for during PREFER_MS, or ''.
-- Returns per task: ok; lost. A repeated call whose first reply was lost answers ok again.

local FIELDS = 13

local function come_back(id, delay)
  watch_expiry(id)
  if delay > 0 then
    schedule(id, now_ms() + delay)
  else
    put_back(id)
  end
end

local function settle(id, owner, action, state, reason, message, exit_code, started, finished, dead, delay, budget,
  prefer)
  local r = fields_of(id, 'owner', 'settled', 'cancel')
  if owner == '' then
    return 'lost' -- nobody's token: what lies in no hands would match it
  elseif r[1] ~= owner then
    return r[2] == owner and 'ok' or 'lost'
  end
  disown(id, owner)
  if r[3] ~= '' and (action == 'retry' or action == 'release') then
    -- Somebody wants it cancelled, and nothing of it runs any more.
    action, state, reason, dead = 'final', 'cancelled', '', '0'
    message = 'cancelled; its last attempt: ' .. (message ~= '' and message or 'not started')
  end
  if action == 'final' then
    close(id, { state = state, reason = reason, message = message, exit_code = exit_code,
      started = started, finished = finished, dead = dead == '1' })
    return 'ok'
  end
  if budget ~= 'none' then
    redis.call('HINCRBY', record_key(id), budget, 1)
  end
  if action ~= 'detach' then
    redis.call('HDEL', record_key(id), 'daemon', 'container', 'cause', 'begun')
  end
  if action == 'retry' then
    redis.call('HINCRBY', record_key(id), 'attempt', 1)
    redis.call('HSET', record_key(id), 'reason', reason, 'message', message, 'exit_code', exit_code,
      'started', started, 'finished', finished)
  end
  if action == 'release' and prefer ~= '' and tonumber(delay) == 0 then
    redis.call('HSET', record_key(id), 'prefers', prefer, 'prefers_until', int(now_ms() + PREFER_MS))
  end
  come_back(id, tonumber(delay))
  return 'ok'
end

local answers = {}
go_on_without_memory()
for i = 1, #ARGV, FIELDS do
  answers[#answers + 1] = settle(unpack(ARGV, i, i + FIELDS - 1))
end
return answers
