-- Renews leases and records progress. ARGV: lease_ms, then per task
--   id, owner, count, and `count` strings: field, value, …
-- Returns per task: ok; cancel (still ours, but somebody wants it cancelled); lost.

local lease = tonumber(ARGV[1])
local now = now_ms()
local answers = {}
go_on_without_memory()
local i = 2
while i <= #ARGV do
  local id, owner, count = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local r = fields_of(id, 'owner', 'cancel', 'deaths', 'taken')
  if owner == '' or r[1] ~= owner then
    answers[#answers + 1] = 'lost'
  else
    redis.call('ZADD', LEASES, int(now + lease), id)
    if tonumber(r[3] ~= '' and r[3] or 0) > 0 and now - r[4] >= 2 * lease then
      redis.call('HSET', record_key(id), 'deaths', '0') -- its owner has lived with it for long enough
    end
    if count > 0 then
      redis.call('HSET', record_key(id), unpack(ARGV, i + 3, i + 2 + count))
      for name = i + 3, i + 2 + count, 2 do
        if ARGV[name] == 'started' then -- and when that was by this clock, which all share
          redis.call('HSETNX', record_key(id), 'begun', int(now))
        end
      end
    end
    answers[#answers + 1] = r[2] ~= '' and 'cancel' or 'ok'
  end
  i = i + 3 + count
end
return answers
